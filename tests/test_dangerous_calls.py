"""What runs code that came with data: none of it is in the package, outside the one switch that allows it."""

import ast
import pickle
import tarfile

import datasets
import pytest

from tests.data.reader_files import png
from tests.data.test_readers_webdataset import found, shard
from tests.test_floors import MODULES
from tests.tiny import tiny
from vlm.errors import UserError
from vlm.generation import load

MODULES_THAT_RUN_CODE = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "code", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    *(
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "shutil.unpack_archive",
        "tempfile.mktemp",
    ),
    *(
        "extractall",
        "pd.read_pickle",
        "sys.setrecursionlimit",
        "ssl._create_unverified_context",
    ),
}


def calls():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", node, ast.unparse(node.func)


def test_no_module_runs_code_from_data():
    for where, node, function in calls():
        assert function not in CALLS | METHODS, f"{where}: {function}"
        assert function.rpartition(".")[2] not in METHODS, f"{where}: {function}"
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        assert options.get("shell", "False") == "False", f"{where}: a shell reads the text"
        assert options.get("allow_pickle", "False") == "False", f"{where}: numpy reads a pickle"
        assert options.get("trust_remote_code", "") != "True", f"{where}: code of a model runs without being asked for"
        if function == "torch.load":
            assert options.get("weights_only") == "True", f"{where}: torch reads a pickle of any objects"
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not MODULES_THAT_RUN_CODE & {each.split(".")[0] for each in imported}, f"{name}: {imported}"


def test_code_of_a_model_is_off_by_default():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                named = [*node.args.posonlyargs, *node.args.args]
                defaults = dict(
                    zip([a.arg for a in named[len(named) - len(node.args.defaults) :]], node.args.defaults, strict=True)
                )
                defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d}
                value = defaults.get("trust_remote_code")
                assert value is None or ast.unparse(value) == "False", f"{name}: {node.name}"


class Harm:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_that_are_a_pickle_do_not_run(tmp_path):
    model, processor = tiny()
    for name in ("model", "processor"):
        {"model": model, "processor": processor}[name].save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    (tmp_path / "folder" / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Harm(tmp_path / "harm")}))
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load(str(tmp_path / "folder"), device="cpu")
    assert not (tmp_path / "harm").exists()
    pickle.loads((tmp_path / "folder" / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "harm").exists(), "it would have"


@pytest.mark.parametrize("streamed", [False, True])
def test_members_of_a_tar_are_not_written(tmp_path, streamed):
    """Shards with names that lead outside, and with links: they are read in memory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    shard(tmp_path / "data" / "0.tar", ("../../evil.png", png(7)), ("../../evil.txt", b"a cat"), ("b.png", png(8)))
    with tarfile.open(tmp_path / "data" / "0.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("b.txt")
            member.type, member.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    examples, problems = found(tmp_path / "data", {"image": "png", "caption": "txt"}, streamed)
    assert examples == [(7, "a cat")]
    assert len(problems) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "evil.png").exists()


def test_data_sets_with_code_are_refused(tmp_path):
    """`datasets` has run no script of a data set since version 4."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError)):
        datasets.load_dataset(str(tmp_path / "set" / "set.py"))
    assert not (tmp_path / "harm").exists()
