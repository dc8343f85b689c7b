from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import errors

import memplan
from memplan.catalog import hub, models
from memplan.catalog.hub import resolve_config
from memplan.errors import ResolutionError, SpecError, UnsupportedError

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty catalog that suggests gpt2, an empty cache, and no hub."""
    monkeypatch.setattr(models, "lookup", lambda name: None)
    monkeypatch.setattr(models, "nearest", lambda name: ["gpt2"])
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(memplan.__file__).parents[1]))  # for subprocesses: it may be relative
    monkeypatch.chdir(tmp_path)


def write(path: Path, config: object = LLAMA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def cache(root: Path, name: str, config: object = LLAMA) -> Path:
    """Lay out a model in a Hugging Face cache, and return its repository folder."""
    repository = root / f"models--{name.replace('/', '--')}"
    blob = write(repository / "blobs" / "b1", config)
    write(repository / "refs" / "main", REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(os.path.relpath(blob, snapshot))
    return repository


# -- what answers, and in which order


def test_a_folder_and_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "llama" / "config.json")
    from_folder, from_file = resolve_config("llama"), resolve_config(file)
    assert from_folder.source == "path:llama"
    assert from_file.source == f"path:{file}"
    assert from_folder.id == "llama"
    assert (from_file.model_type, from_file.architecture) == ("llama", "LlamaForCausalLM")
    assert from_file.config["hidden_size"] == 64


def test_a_file_of_any_name_and_a_home_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.json")
    assert resolve_config("~/mine.json").model_type == "llama"


def test_the_order_is_path_catalog_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(tmp_path / "hf" / "hub", "org/name", LLAMA | {"hidden_size": 1})
    assert resolve_config("org/name").source == f"hf-cache@{REVISION}"
    row = SimpleNamespace(id="org/name", config=LLAMA | {"hidden_size": 2}, source="hub page")
    monkeypatch.setattr(models, "lookup", lambda name: row if name == "org/name" else None)
    assert resolve_config("org/name").source == "catalog"
    assert resolve_config("org/name").config["hidden_size"] == 2
    write(tmp_path / "org" / "name" / "config.json", LLAMA | {"hidden_size": 3})
    assert resolve_config("org/name").source == "path:org/name"


def test_the_real_catalog_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_config("meta-llama/Llama-2-7b").source == "catalog"
    with pytest.raises(ResolutionError, match=r"Did you mean .*meta-llama/Llama-2-7b"):
        resolve_config("meta-llama/Llama-2-7bb")


def test_every_model_of_the_catalog_resolves_unless_it_needs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = models.all_models()
    assert any(row.remote_code for row in rows)
    for row in rows:
        if row.remote_code:
            with pytest.raises(UnsupportedError, match="remote code is never run"):
                resolve_config(row.id)
        else:
            model = resolve_config(row.id)
            assert (model.source, model.model_type) == ("catalog", row.config["model_type"])
            assert model.architecture == row.config["architectures"][0]


@pytest.mark.parametrize(
    ("variable", "value", "folder"),
    [
        ("HF_HUB_CACHE", "{tmp}/a", "a"),
        ("HF_HUB_CACHE", "$HF_PLACE/b", "b"),
        ("HUGGINGFACE_HUB_CACHE", "{tmp}/c", "c"),
        ("HF_HOME", "{tmp}/d", "d/hub"),
        ("XDG_CACHE_HOME", "{tmp}/e", "e/huggingface/hub"),
        ("HOME", "{tmp}/f", "f/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, folder: str
) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_PLACE", str(tmp_path))
    monkeypatch.setenv(variable, value.format(tmp=tmp_path))
    cache(tmp_path / folder, "org/name")
    assert resolve_config("org/name").source == f"hf-cache@{REVISION}"
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(tmp_path / folder)


@pytest.mark.parametrize("missing", ["refs/main", f"snapshots/{REVISION}/config.json", "blobs/b1"])
def test_an_incomplete_cache_does_not_answer(tmp_path: Path, missing: str) -> None:
    (cache(tmp_path / "hf" / "hub", "org/name") / missing).unlink()
    with pytest.raises(ResolutionError, match="HF_HUB_OFFLINE is set"):
        resolve_config("org/name")


def test_what_is_local_imports_no_huggingface_hub(tmp_path: Path) -> None:
    cache(tmp_path / "hf" / "hub", "org/name")
    write(tmp_path / "here" / "config.json")
    code = (
        "import sys; from memplan.catalog.hub import resolve_config\n"
        "from memplan.errors import ResolutionError\n"
        "print(resolve_config('here').source, resolve_config('org/name').source)\n"
        "try: resolve_config('org/other')\n"
        "except ResolutionError: print('refused')\n"
        "print([name for name in ('huggingface_hub', 'torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.split("\n")[:3] == [f"path:here hf-cache@{REVISION}", "refused", "[]"]


# -- names that lead nowhere


@pytest.mark.parametrize("name", ["", "  ", "a\0b", b"gpt2", None, 5])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(
        ResolutionError, match=r"^model: .* is not a model\. Give a hub id, a folder or a config\.json\."
    ):
        resolve_config(name)


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "./gone",
        "/gone/config.json",
        "gone.json",
        "x y",
        "org/na--me",
        "a..b",
        "a.git",
        "-a",
        "a/",
        "/",
        "ä",
        "~no/x",
        "a" * 97,
        "a" * 100_000,
        "../x",
        "a\\b",
        "org/name@main",
    ],
)
def test_what_is_neither_a_path_nor_an_id(name: str) -> None:
    with pytest.raises(ResolutionError) as error:
        resolve_config(name)
    assert " is neither an existing path nor a hub id. " in str(error.value) or name == "/"
    assert len(str(error.value)) < 300


def test_the_ids_that_pass_are_those_of_huggingface_hub() -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    names = [
        "gpt2",
        "a",
        "_a",
        "a/b",
        "a_/b.c",
        "a./b",
        "a/-b",
        "a-/b",
        "a/b-",
        "A1/B.2-c_d",
        "a/b.git",
        "a--b",
        "1/2",
        "a" * 96,
    ]
    for name in [*names, "", "a/b/c", "a b", "é", "a" * 97, "a\n", ".a", "a.", "a/.b", "..", "a/..", "b/" + "a" * 96]:
        try:
            validate_repo_id(name)
        except HFValidationError:
            valid = False
        else:
            valid = True
        assert bool(hub._HUB_ID.fullmatch(name)) == valid, name


def test_a_web_address_is_led_to_its_id() -> None:
    with pytest.raises(ResolutionError, match=r"Write meta-llama/Llama-2-7b\.$"):
        resolve_config("https://huggingface.co/meta-llama/Llama-2-7b/blob/main/config.json")


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_offline(monkeypatch: pytest.MonkeyPatch, switch: str, value: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(switch, value)
    with pytest.raises(ResolutionError) as error:
        resolve_config("org/gpt22")
    assert str(error.value) == (
        f"model: 'org/gpt22' is not in the catalog or the local cache, and {switch} is set. "
        f"Did you mean gpt2? Unset {switch} to ask the hub, or give a folder with its config.json."
    )


# -- files that are no config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON: Expecting value at line 1, column 1. It ends too early: fetch it again."),
        ('{"model_type": "lla', "Unterminated string starting at at line 1, column 16. It ends too early"),
        ('{"model_type": "llama",\n "x": 1', "at line 2, column 8. It ends too early: fetch it again."),
        ('{"model_type": llama}', "is not JSON: Expecting value at line 1, column 16. Correct it there."),
        ('{\n"a": 1,\n}', "line 3, column 1"),
        ("[1, 2]", "holds an array, not an object"),
        ('"llama"', "holds a string, not an object"),
        ("null", "holds null, not an object"),
        ("true", "holds a boolean, not an object"),
        ("3", "holds a number, not an object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON that can be read: "),
        ("{}", "model_type: missing"),
        ('{"model_type": null}', "model_type: is null"),
        ('{"model_type": 5}', "model_type: 5 is not text"),
        ('{"model_type": "llama"}', "architectures: missing"),
        ('{"model_type": "llama", "architectures": []}', "architectures: [] names no class"),
        ('{"model_type": "llama", "architectures": "LlamaForCausalLM"}', "is not a list of names"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: str, message: str) -> None:
    file = write(tmp_path / "m" / "config.json", content)
    with pytest.raises(SpecError) as error:
        resolve_config(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_field_suggests_a_misspelt_one(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model_typ": "llama"})
    with pytest.raises(SpecError, match=r"model_type: missing\. .* Did you mean model_typ\?"):
        resolve_config(".")


def test_a_broken_cached_file_is_named(tmp_path: Path) -> None:
    cache(tmp_path / "hf" / "hub", "org/name", "{")
    with pytest.raises(SpecError, match=rf"snapshots/{REVISION}/config\.json: is not JSON"):
        resolve_config("org/name")


@pytest.mark.parametrize(
    ("content", "byte"), [(b"\x80\x02}q", "byte 0 is 0x80"), ('{"a": "é"}'.encode("latin-1"), "byte 7 is 0xe9")]
)
def test_what_is_not_utf8(tmp_path: Path, content: bytes, byte: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SpecError, match=f"is not UTF-8 text: {byte}"):
        resolve_config(".")


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(2**30)

    def opened(*args: object, **kwargs: object) -> None:
        pytest.fail("the file was opened")

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(SpecError, match=r"model\.safetensors: has 1073741824 bytes, too many for a config\.json"):
        resolve_config(file)


def test_ten_mebibytes_are_the_limit(tmp_path: Path) -> None:
    text = json.dumps(LLAMA)
    file = write(tmp_path / "config.json", text.ljust(10 * 2**20))
    assert resolve_config(file).model_type == "llama"
    write(file, text.ljust(10 * 2**20 + 1))
    with pytest.raises(SpecError, match="has 10485761 bytes"):
        resolve_config(file)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "config.json", "[" + " " * 2000)
    monkeypatch.setattr(hub, "_LARGEST_FILE", 1000)
    status = os.stat_result((0o100644, 0, 0, 1, 0, 0, 10, 0, 0, 0))  # what it was: ten bytes
    monkeypatch.setattr(Path, "stat", lambda self, **_: status)
    with pytest.raises(SpecError, match="has 1001 bytes"):
        hub._read(file)


def test_a_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(ResolutionError) as error:
        resolve_config("gpt2")
    assert str(error.value) == (
        "gpt2: is a folder without config.json. Give the folder that from_pretrained loads; "
        "if the hub's gpt2 is meant, run from a folder without that path."
    )
    write(tmp_path / "gpt2" / "adapter_config.json", {})
    with pytest.raises(ResolutionError, match=r"gpt2: holds a PEFT adapter, not a model\. Give its base model\."):
        resolve_config("gpt2")


def test_broken_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").symlink_to("../blobs/gone")
    for name, path in (("link", "link"), ("m", "m/config.json")):
        with pytest.raises(ResolutionError, match=f"^{path}: is a link that leads nowhere"):
            resolve_config(name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ResolutionError, match=r"^loop: cannot be read"):
        resolve_config("loop")


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "m" / "config.json").mkdir(parents=True)
    for name, path in (("pipe", "pipe"), ("m", "m/config.json"), ("/dev/zero", "/dev/zero")):
        with pytest.raises(ResolutionError, match=f"^{path}: is not a regular file"):
            resolve_config(name)


@pytest.mark.parametrize("call", ["lstat", "open"])
def test_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    # Raised by hand: to root, who runs many containers, no file is closed.
    file = write(tmp_path / "config.json")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(ResolutionError) as error:
        resolve_config(file)
    assert str(error.value) == f"{file}: cannot be read (permission denied). Check the path and its permissions."


def test_a_path_through_a_file(tmp_path: Path) -> None:
    write(tmp_path / "config.json")
    with pytest.raises(ResolutionError, match="neither an existing path nor a hub id"):
        resolve_config("./config.json/config.json")


# -- configs of models that are not taken


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "mpt7", "auto_map": {"AutoModelForCausalLM": "modeling_mpt7.Model"}}
    write(tmp_path / "config.json", config)
    with pytest.raises(
        UnsupportedError, match=r"own code \(auto_map\) for model_type 'mpt7', and remote code is never"
    ):
        resolve_config(".", known_model_types={"llama"})
    assert resolve_config(".", known_model_types={"mpt7"}).model_type == "mpt7"
    write(tmp_path / "config.json", config | {"auto_map": None})
    assert resolve_config(".").model_type == "mpt7"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"text_config": {"model_type": "llama"}, "vision_config": {}},
            "is multimodal (llava with text_config, vision_config), which memplan does not model. "
            "Its text part is a llama model: give that model's config.",
        ),
        ({"vision_config": {"model_type": "vit"}}, "It is built on a text model: give that model's config."),
        ({"audio_config": {}, "text_config": {}}, "(llava with text_config, audio_config)"),
    ],
)
def test_multimodal_models(tmp_path: Path, parts: dict[str, object], message: str) -> None:
    write(tmp_path / "config.json", {"model_type": "llava", "architectures": ["X"]} | parts)
    with pytest.raises(UnsupportedError) as error:
        resolve_config(".")
    assert message in str(error.value)


def test_a_null_part_is_no_part(tmp_path: Path) -> None:
    write(tmp_path / "config.json", LLAMA | {"vision_config": None})
    assert resolve_config(".").model_type == "llama"


# -- the hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


def answer(monkeypatch: pytest.MonkeyPatch, path: Path | Exception, size: int | None = 100) -> list[tuple[str, str]]:
    """Let the hub answer with a file, or an error; return the list of what was downloaded."""
    asked: list[tuple[str, str]] = []

    def metadata(url: str) -> SimpleNamespace:
        assert url == "https://huggingface.co/org/name/resolve/main/config.json"
        if isinstance(path, Exception):
            raise path
        return SimpleNamespace(size=size)

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("size", [100, None])
def test_the_hub_is_asked_for_the_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    asked = answer(monkeypatch, write(tmp_path / "snapshots" / REVISION / "config.json"), size)
    model = resolve_config("org/name")
    assert model.source == f"hub@{REVISION}"
    assert asked == [("org/name", "config.json")]


@pytest.mark.usefixtures("online")
def test_a_huge_config_on_the_hub_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, tmp_path, size=2**30)
    with pytest.raises(ResolutionError, match=r"has a config\.json of 1073741824 bytes on the hub"):
        resolve_config("org/name")
    assert asked == []


def hub_error(kind: type[Exception], status: int | None) -> Exception:
    """Make an error as huggingface_hub raises it; its constructors differ between versions."""
    error = kind.__new__(kind, f"{status} Client Error.\n\nMany lines.")
    if status is not None:
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            hub_error(errors.GatedRepoError, 403),
            "is gated: the hub refused its config.json. Accept its licence at https://huggingface.co/org/name and set "
            "HF_TOKEN to your token, or give a folder with its config.json.",
        ),
        (hub_error(errors.GatedRepoError, 401), "is gated: the hub refused its config.json. Accept its licence"),
        (hub_error(errors.HfHubHTTPError, 403), "is gated: the hub refused its config.json. Accept its licence"),
        (
            hub_error(errors.RepositoryNotFoundError, 401),
            "was not found on the hub. Did you mean gpt2? If it is private, set HF_TOKEN; or give a folder",
        ),
        (hub_error(errors.RemoteEntryNotFoundError, 404), "has no config.json on the hub. Name a repository in the tr"),
        (hub_error(errors.HfHubHTTPError, 503), "could not be fetched: the hub answered 503. Try again later, or give"),
        (
            ConnectionError("no route"),
            "is not in the catalog or the local cache, and the hub could not be reached (ConnectionError). "
            "Did you mean gpt2? Check the connection and HF_ENDPOINT, or give",
        ),
        (hub_error(errors.LocalEntryNotFoundError, None), "could not be reached (LocalEntryNotFoundError)"),
        (RuntimeError("a client of another kind"), "could not be reached (RuntimeError)"),
        (OSError(28, "No space left on device"), "/hf/hub (No space left on device). Set HF_HOME to a folder with"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    answer(monkeypatch, error)
    with pytest.raises(ResolutionError) as raised:
        resolve_config("org/name")
    assert str(raised.value).startswith("model: 'org/name' ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for ``config.json``, and nothing else, on this machine."""

    seen: ClassVar[list[tuple[str, str | None]]] = []
    refusals: ClassVar[dict[str, tuple[int, str]]] = {
        "org/gated": (403, "GatedRepo"),
        "org/gone": (404, "RepoNotFound"),
        "org/weights": (404, "EntryNotFound"),
        "org/broken": (500, ""),
    }

    def do_HEAD(self) -> None:
        name = self.path.removesuffix("/resolve/main/config.json").strip("/")
        self.seen.append((self.path, self.headers.get("Authorization")))
        status, code = self.refusals.get(name, (200, ""))
        body = json.dumps(LLAMA).encode() if status == 200 else b""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", '"e1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def local_hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Hub.seen.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_huggingface_hub_itself_against_a_local_hub(tmp_path: Path, local_hub: str) -> None:
    # In a process of its own, since huggingface_hub reads its environment when it is imported.
    names = ["org/name", "org/name", "org/gated", "org/gone", "org/weights", "org/broken"]
    code = (
        "import sys; from memplan.catalog import models; models.lookup = lambda name: None\n"
        "models.nearest = lambda name: []\n"
        "from memplan.catalog.hub import resolve_config\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(resolve_config(name).source)\n"
        "    except Exception as error: print(error)\n"
    )
    environ = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environ |= {
        "HF_ENDPOINT": local_hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }
    run = subprocess.run([sys.executable, "-c", code, *names], env=environ, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0] == f"hub@{REVISION}"
    assert lines[1] == f"hf-cache@{REVISION}"
    assert lines[2].startswith(
        f"model: 'org/gated' is gated: the hub refused its config.json. Accept its licence at {local_hub}/"
    )
    assert lines[3].startswith("model: 'org/gone' was not found on the hub. If it is private")
    assert lines[4].startswith("model: 'org/weights' has no config.json on the hub.")
    assert lines[5].startswith("model: 'org/broken' could not be fetched: the hub answered 500.")
    asked = [(path, token) for path, token in Hub.seen if not path.startswith("/api/")]  # huggingface_hub's own errands
    assert {path for path, _ in asked} == {f"/{name}/resolve/main/config.json" for name in names}
    assert {token for _, token in asked} == {"Bearer hf_secret"}
    assert "hf_secret" not in run.stdout + run.stderr
