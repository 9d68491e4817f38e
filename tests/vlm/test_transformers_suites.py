"""transformers' own test suites over ten variants of our model and over its Llava."""

import importlib.util
import shutil
import subprocess

import pytest
import transformers

from tests.transformers_suites import source
from tests.transformers_suites.allowed import Allowed, problems
from tests.transformers_suites.run import Outcome, run
from tests.transformers_suites.source import MissingSuitesError, locate
from tests.transformers_suites.variants import LLAVA, VARIANTS


@pytest.fixture(scope="module")
def folder():
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("transformers' tests need the package parameterized: pip install -e '.[test]'")
    try:
        return locate()
    except MissingSuitesError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != LLAVA])
def test_a_variant_fails_no_test_that_is_not_listed(folder, variant):
    outcomes = run(variant, folder)
    assert sum(outcome.outcome == "passed" for outcome in outcomes.values()) > 100
    assert not problems(variant, outcomes)


def outcome(kind):
    return Outcome("Model", kind, "why")


def test_failures_are_problems_unless_they_are_listed():
    outcomes = {"Model::a": outcome("failed"), "Model::b": outcome("failed"), "Model::c": outcome("passed")}
    assert problems("prefix", outcomes, [Allowed("Model::a", "")]) == ["Model::b fails over prefix: why"]
    assert len(problems("prefix", outcomes, [Allowed("Model::a", "", ("other",))])) == 2


@pytest.mark.parametrize("kind", ["passed", "skipped"])
def test_a_listed_failure_that_does_not_occur_is_a_problem(kind):
    listed = [Allowed("Model::a", ""), Allowed("Model::missing", "")]
    (problem,) = problems("prefix", {"Model::a": outcome(kind)}, listed)
    assert problem == f"Model::a {kind} over prefix, and is listed as a failure: take it off the list"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize(("tag", "there"), [(f"v{transformers.__version__}", True), ("v0.0.1", False)])
def test_generation_tests_are_those_of_the_installed_version(tag, there, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    path = repository / "tests" / source.GENERATION
    path.parent.mkdir(parents=True)
    path.write_text("tagged")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "one"], ["tag", tag], ["rm", str(path)]):
        subprocess.run(["git", "-C", str(repository), *command], check=True, capture_output=True)
    monkeypatch.setattr(source, "REPOSITORY", repository.as_uri())
    assert source.clone_generation_tests(tmp_path / "clone") == there
    assert not there or (tmp_path / "clone" / "tests" / source.GENERATION).read_text() == "tagged"
