"""Every recipe that comes with vlm, through the same checks as a user's own."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from vlm import recipe
from vlm.recipe_source import read_yaml

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_all_are_packaged_and_say_what_they_do() -> None:
    assert sorted(recipe.packaged()) == NAMES
    assert {"quickstart", "easy_vqa", "caption", "vqa"} <= set(NAMES)
    assert all(len(about) > 20 for about in recipe.packaged().values())


CONFIGURATIONS = ["accelerate/ddp", "accelerate/fsdp2", "accelerate/zero2", "accelerate/zero3"]
SEVERAL_MACHINES = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
SEVERAL_MACHINES += ["--main_process_port", "29500"]


def test_configurations_for_accelerate_are_shown_but_are_no_recipes() -> None:
    assert recipe.accelerate_configurations() == CONFIGURATIONS
    assert not set(CONFIGURATIONS) & set(recipe.packaged())
    with pytest.raises(recipe.RecipeError, match="no recipe of that name comes with vlm"):
        recipe.load("accelerate/ddp")


@pytest.mark.parametrize("machines", [[], SEVERAL_MACHINES], ids=["one machine", "several"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_launch_understands_it(name: str, machines: list[str], tmp_path: Path) -> None:
    """As printed, with what its comment says is added."""
    (tmp_path / "launch.yaml").write_text(recipe.packaged_text(name))
    words = ["--config_file", str(tmp_path / "launch.yaml"), "--num_processes", "16", *machines]
    words += ["-m", "vlm", "train", "mine.yaml"]
    arguments = launch.launch_command_parser().parse_args(words)
    arguments, found, _ = launch._validate_launch_command(arguments)
    assert (arguments.num_processes, arguments.num_machines) == (16, 2 if machines else 1)
    assert arguments.module
    kind = found.distributed_type
    if kind == DistributedType.DEEPSPEED:
        assert arguments.use_deepspeed
        assert arguments.zero_stage == int(name[-1])
        return
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.main_process_ip == ("10.0.0.1" if machines else None)
    assert environment.get("ACCELERATE_USE_FSDP", "false") == ("true" if name == "accelerate/fsdp2" else "false")
    if name == "accelerate/fsdp2":
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
        assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    else:
        assert arguments.multi_gpu


def test_what_is_sharded_may_wait_in_the_memory_of_the_machine(tmp_path: Path) -> None:
    """The keys that the files name for it, turned on, as accelerate reads them."""

    def arguments_with(name: str, *changes: tuple[str, str]) -> Any:
        text = recipe.packaged_text(name)
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        (tmp_path / "launch.yaml").write_text(text)
        words = ["--config_file", str(tmp_path / "launch.yaml"), "--num_processes", "1", "-m", "vlm"]
        return launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]

    fsdp = arguments_with("accelerate/fsdp2", ("fsdp_offload_params: false", "fsdp_offload_params: true"))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in prepare_multi_gpu_env(fsdp).items():
            patch.setenv(key, value)
        assert isinstance(FullyShardedDataParallelPlugin().cpu_offload, CPUOffloadPolicy)
    zero3 = arguments_with(
        "accelerate/zero3",
        ("optimizer_device: none", "optimizer_device: cpu"),
        ("param_device: none", "param_device: cpu"),
    )
    assert (zero3.offload_optimizer_device, zero3.offload_param_device) == ("cpu", "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_comes_back_unchanged(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded == recipe.load(FOLDER / f"{name}.yaml", [f"data.base_dir={loaded.data.base_dir}"])
    assert recipe.from_dict(yaml.safe_load(yaml.safe_dump(loaded.resolved()))) == loaded
    assert loaded.is_scored, "a recipe of ours ends with a score"


@pytest.mark.parametrize("name", NAMES)
def test_it_asks_in_validation_what_it_asks_in_training(name: str) -> None:
    data = recipe.load(name).data
    assert data.validation is not None
    for key in ("format", "prompt", "question_prompt", "columns"):
        assert data.train.get(key) == data.validation.get(key)
    assert data.train != data.validation


@pytest.mark.parametrize("name", NAMES)
def test_it_means_the_same_to_other_readers_of_yaml(name: str) -> None:
    text = recipe.packaged_text(name)
    assert read_yaml(text, name)[0] == yaml.safe_load(text)
