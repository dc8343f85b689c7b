"""The README and the pages of docs/: what they show runs, what they link to is there, and the site builds strictly."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import memplan
from memplan import answers, cli, results
from memplan.answers import Plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {
    "adding-a-family.md": "test_adding_a_family.py",
    "engine-config.md": "configs/test_page.py",
    "planning.md": "test_planner.py",
    "preflight.md": "integrations/test_page.py",
}
"""Pages with a test of their own, which needs more than the page says."""
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}
SFT = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "model_name_or_path": "./my-model",
    "output_dir": "out",
}
NO_ANSWERS = {"Result", "Answer", "Recipe"}
"""Of the modules of answers: what these are made with."""
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = {"text", "json", "yaml"}
ASSIGNMENT = re.compile(r"[A-Z_]+=")
NOT_OURS = ("make", "pip", "bash", "sbatch", "python")
"""Programs that are not run here; what of them can be told is checked."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found[1], found[3], text.count("\n", 0, found.start()) + 1)


def commands(block: Block) -> list[str]:
    """Of a console those behind a prompt; of a block without a language its lines, which must all be commands."""
    lines = block.text.splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    starts = ("memplan ", *(f"{name} " for name in NOT_OURS))
    assert all(not line or line.startswith(starts) for line in lines), f"line {block.line}: say what this block is"
    return [line for line in lines if line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of, on a machine without a GPU."""
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "ds_config.json").write_text(json.dumps(DEEPSPEED))
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(SFT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(list(blocks(page))), "a fence that is not closed"
    for block in blocks(page):
        assert block.language in {"python", "pycon", "console", "", *OUTPUT}, block
        if block.language in ("console", ""):
            assert commands(block), block
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            yaml.safe_load(block.text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in RUN_ELSEWHERE], ids=lambda page: page.name)
def test_python_runs(page: Path, folder: Path) -> None:
    """Doctests, and code without prompts, of one page in one namespace, in their order."""
    names: dict[str, Any] = {"__name__": "__main__"}
    if page.name == "tracing.md":
        names["MyModel"] = _my_model()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    said: list[str] = []
    for block in blocks(page):
        if block.language not in ("python", "pycon"):
            continue
        if ">>>" in block.text:
            test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line)
            test.globs = names  # parser copies them
            runner.run(test, out=said.append, clear_globs=False)
        else:
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    assert not said, "".join(said)
    if "matplotlib" in sys.modules:
        from matplotlib import pyplot

        pyplot.close("all")


def _my_model() -> Any:
    import torch

    class MyModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(100, 8)
            self.head = torch.nn.Linear(8, 100)

        def forward(self, tokens: Any, targets: Any) -> Any:
            logits = self.head(self.table(tokens))
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return MyModel


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in {*RUN_ELSEWHERE, "cli.md"}], ids=lambda page: page.name
)
def test_commands_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page):
        if block.language not in ("console", ""):
            continue
        for command in commands(block):
            name, *arguments = dropwhile(ASSIGNMENT.match, shlex.split(command, comments=True))
            if name == "memplan":
                _runs(arguments, capsys)
            else:
                _is_there(name, arguments)
    if page.name == "README.md":
        module = _script("generate_demo")
        plan = Plan.from_json(Path("run", "plan.json").read_text(encoding="utf-8"))
        assert module.PICTURE.read_text(encoding="utf-8") == module.picture(plan), "run python docs/generate_demo.py"


def _runs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "&&" in arguments:
        arguments = arguments[: arguments.index("&&")]
    if arguments[0] == "check" and not Path(arguments[1]).exists():
        Path(arguments[1]).mkdir()
        memplan.plan("gpt2", {"seq_len": 64}, "1xT4").write(arguments[1], force=True)
    code = cli.main(arguments)
    captured = capsys.readouterr()
    if arguments[0] in ("measure", "calibrate"):  # needs a GPU, and says so
        assert code == 2
        assert "GPU" in captured.err
    else:
        assert code in (0, 1, 3), (arguments, captured.err)
        assert captured.err == "", arguments


def _is_there(name: str, arguments: list[str]) -> None:
    """What is not run: the target, the extra, the script or the module is there."""
    if name == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), arguments
    elif name == "pip":
        extra = re.search(r"(?:memplan|\.)\[(\w+)\]", " ".join(arguments))
        assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    elif name == "python" and arguments[0] != "-m":
        assert (ROOT / arguments[0]).exists()
    else:
        assert name in NOT_OURS


def test_pages_with_a_test_of_their_own_have_it() -> None:
    for page, test in RUN_ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8"), page


# -- the site


def test_every_public_name_has_a_place() -> None:
    reference = "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "results.md", "specs.md")
    )
    shown = re.findall(r"^::: memplan\.(\w+)$", reference, re.MULTILINE)
    assert sorted(shown) == sorted(memplan.__all__)


def test_every_part_of_an_answer_has_a_place_and_says_what_it_is() -> None:
    """MkDocs leaves out what has no docstring, without a word."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (memplan\.[\w.]+)$", page, re.MULTILINE)}
    for module in (results, answers):
        for statement in ast.parse(inspect.getsource(module)).body:
            if not isinstance(statement, ast.ClassDef) or statement.name in NO_ANSWERS:
                continue
            assert statement.name in shown, statement.name
            for one, after in pairwise([*statement.body, None]):
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.target.id[0] != "_":
                    is_said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert is_said, f"{statement.name}.{one.target.id}"
    public = [getattr(memplan, name) for name in memplan.__all__]
    fields = [model for model in public if isinstance(model, type) and issubclass(model, results.Result)]
    assert {model.__name__ for model in fields} <= shown


def test_links_lead_somewhere() -> None:
    """Of the README, which is no page of the site, and of the notebooks."""
    places = [ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]
    for place in places:
        for link in re.findall(r"\]\(([^)\s]+)\)", place.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = place.parent / path if path else place
            assert target.exists(), f"{place.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in headings}, link


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Strictly: a link that leads nowhere, a page that is in no menu, or a name without documentation ends it."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    names = {page.stem for page in PAGES} - {"README"}
    assert {page.parent.name if page.parent.name != "site" else "index" for page in pages} >= names
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(?:https?:)?//""", text), page


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_accuracy_of_its_page() -> None:
    module = _script("generate_demo")
    assert module.accuracy_block(module.README.read_text(encoding="utf-8")) == module.accuracy()


def test_what_the_readme_leaves_out_is_marked() -> None:
    module = _script("generate_demo")
    pages = ["head", "table", "chosen", "  charts", "  host", "  verdict    fits", "Assumptions", "  try"]
    shown = module.shown(module.PLAN, "\n\n".join(pages))
    assert shown.split("\n\n") == ["head", "table", "chosen", "...", "  verdict    fits", "...", "  try"]


def test_the_terms_are_current() -> None:
    module = _script("generate_terms")
    assert module.block(module.PAGE.read_text(encoding="utf-8")) == module.tables(), "run python docs/generate_terms.py"


def test_bare_doctests_become_code() -> None:
    assert doctest.testmod(_script("hooks")) == (0, 1)
