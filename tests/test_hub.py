"""Fetching against a real huggingface_hub client and a small hub on this machine.

The client reads its settings when it is imported, so fetches run in other processes.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMITS, Hub

from lfm_mlx.errors import CheckpointError, OptionError
from lfm_mlx.hub import fetch, validate_repo_id

ROOT = Path(__file__).resolve().parent.parent
SECRET = "hf_the_secret_of_this_test"

PLAIN = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "LICENSE": b"LFM Open License",
    "README.md": b"# A model",
    "model.safetensors": bytes(range(256)) * 1200,
}
UNNEEDED = {
    "pytorch_model.bin": b"pickle",
    "lfm-Q4_0.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "model_fp32/model.safetensors": b"fp32",
    "original/consolidated.pth": b"pth",
    "consolidated.safetensors": b"consolidated",
    "figure.png": b"png",
    "tokenizer.png": b"png",
    "training_args.json": b"{}",
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}}).encode()
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    **{name: name.encode() for name in SHARDS},
    "model.safetensors": b"the same weights again, in one file",
}
PRECISIONS = {f"{folder}/{name}": data for folder in ("8bit", "4bit", "bf16") for name, data in PLAIN.items()}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fetch in another process gave: a folder or an error."""

    folder: Path | None = None
    error: str | None = None
    message: str = ""
    cause: str | None = None

    def files(self) -> dict[str, bytes]:
        assert self.folder is not None, self.message
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}


FETCH = """
import json, resource, sys
from lfm_mlx.errors import LfmError
from lfm_mlx.hub import fetch
if max_file_bytes := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
for line in sys.stdin:
    model, options = json.loads(line)
    try:
        answer = {"folder": str(fetch(model, **options))}
    except LfmError as error:
        cause = type(error.__cause__).__name__ if error.__cause__ else None
        answer = {"error": type(error).__name__, "message": str(error), "cause": cause}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that fetches on demand, with a cache and settings of its own."""

    def __init__(self, home: Path, endpoint: str, *, max_file_bytes: int = 0, **environment: str) -> None:
        kept = {
            name: value for name, value in os.environ.items() if not re.match("(?i)hf_|.*proxy|transformers_", name)
        }
        settings = {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.stderr = home / "stderr"
        with self.stderr.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", FETCH, str(max_file_bytes)],
                env=kept | settings | environment,
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *args: object) -> None:
        self.process.kill()
        self.process.communicate()

    def fetch(self, model: str, **options: Any) -> Outcome:
        self.ask(model, **options)
        return self.outcome()

    def ask(self, model: str, **options: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([model, options]) + "\n")
        self.process.stdin.flush()

    def outcome(self) -> Outcome:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.stderr.read_text()
        answer = json.loads(line)
        folder = answer.pop("folder", None)
        return Outcome(folder=Path(folder) if folder else None, **answer)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    running = Hub()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    with Client(home, hub.address) as running:
        yield running


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


# What is downloaded


def test_a_repo_arrives_without_the_files_nobody_reads(hub: Hub, client: Client) -> None:
    repo = hub.add(PLAIN | UNNEEDED)
    assert client.fetch(repo).files() == PLAIN
    assert hub.downloaded(repo) == set(PLAIN)
    assert "Fetching" in client.stderr.read_text()


def test_without_weights_only_config_and_tokenizer_arrive(hub: Hub, client: Client) -> None:
    repo = hub.add(SHARDED)
    client.fetch(repo, weights=False)
    assert hub.downloaded(repo) == {"config.json"}


def test_an_index_decides_which_weight_files_arrive(hub: Hub, client: Client) -> None:
    repo = hub.add(SHARDED)
    assert "model.safetensors" in SHARDED
    assert set(client.fetch(repo).files()) == {"config.json", "model.safetensors.index.json", *SHARDS}


def test_a_second_fetch_downloads_nothing_again(hub: Hub, client: Client) -> None:
    repo = hub.add(PLAIN)
    first = client.fetch(repo)
    assert hub.downloaded(repo)
    hub.requests.clear()
    assert client.fetch(repo) == first
    assert not hub.downloaded(repo)


@pytest.mark.parametrize(("ending", "options"), [("/4bit", {}), ("/", {"subfolder": "4bit/"})])
def test_a_named_subfolder_arrives_alone(hub: Hub, client: Client, ending: str, options: dict[str, str]) -> None:
    repo = hub.add(PRECISIONS)
    outcome = client.fetch(repo + ending, **options)
    assert outcome.folder is not None
    assert outcome.folder.name == "4bit"
    assert outcome.files() == PLAIN
    assert hub.downloaded(repo) == {f"4bit/{name}" for name in PLAIN}


def test_the_only_subfolder_with_a_config_is_taken(hub: Hub, client: Client) -> None:
    repo = hub.add({"LICENSE": b"LFM"} | {f"mlx/{name}": data for name, data in PLAIN.items()})
    assert client.fetch(repo).files() == PLAIN
    assert hub.downloaded(repo) == {"LICENSE", *(f"mlx/{name}" for name in PLAIN)}


def test_several_subfolders_are_listed_and_no_weights_arrive(hub: Hub, client: Client) -> None:
    repo = hub.add(PRECISIONS)
    outcome = client.fetch(repo)
    assert outcome == Outcome(
        error="CheckpointError",
        message=f"{repo}: several checkpoints, 4bit, 8bit, bf16; expected one; "
        "add /4bit to the name or pass subfolder=",
    )
    assert {Path(path).name for path in hub.downloaded(repo)} == {"config.json"}


def test_an_unknown_subfolder_is_answered_with_the_known_ones(hub: Hub, client: Client) -> None:
    outcome = client.fetch(f"{hub.add(PRECISIONS)}/3bit")
    assert outcome.error == "CheckpointError"
    assert "subfolder 3bit; expected one of: 4bit, 8bit, bf16" in outcome.message


# What is asked for


def test_a_revision_is_asked_for_by_name(hub: Hub, client: Client) -> None:
    repo = hub.add(PLAIN)
    outcome = client.fetch(repo, revision="v1", weights=False)
    assert outcome.folder is not None
    assert outcome.folder.name == COMMITS["v1"]
    assert f"/api/models/{repo}/revision/v1" in {request.path for request in hub.requests}


def test_a_token_opens_a_gated_repo(hub: Hub, client: Client) -> None:
    repo = hub.add(PLAIN, token=SECRET)
    assert client.fetch(repo, token=SECRET).files() == PLAIN
    assert {request.authorization for request in hub.asked(repo)} == {f"Bearer {SECRET}"}


def test_the_token_of_the_environment_opens_a_gated_repo(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add(PLAIN, token=SECRET)
    with Client(tmp_path, hub.address, HF_TOKEN=SECRET) as client:
        assert client.fetch(repo).files() == PLAIN


def test_a_wrong_token_is_refused_and_not_repeated_in_the_message(hub: Hub, client: Client) -> None:
    outcome = client.fetch(hub.add(PLAIN, token=SECRET), token="hf_wrong")
    assert outcome.error == "DownloadError"
    assert "gated (HTTP 401)" in outcome.message
    assert "hf_wrong" not in outcome.message


# Offline and interruptions


def test_offline_fails_clearly_before_a_download_and_works_after_it(hub: Hub, client: Client) -> None:
    repo = hub.add(PRECISIONS)
    before = client.fetch(f"{repo}/4bit", offline=True)
    assert before.error == "DownloadError"
    assert "offline; expected an earlier download" in before.message
    assert not hub.asked(repo)
    online = client.fetch(f"{repo}/4bit")
    hub.requests.clear()
    assert client.fetch(f"{repo}/4bit", offline=True) == online
    assert client.fetch(f"{repo}/8bit", offline=True).error == "DownloadError"
    assert not hub.asked(repo)


def test_what_was_downloaded_works_without_the_hub(hub: Hub, client: Client, home: Path) -> None:
    repo = hub.add(PLAIN)
    online = client.fetch(repo)
    stopped = Hub()
    stopped.stop()
    with Client(home, stopped.address, HF_HUB_OFFLINE="1") as offline:
        assert offline.fetch(repo) == online
        assert "offline; expected an earlier download" in offline.fetch("org/absent").message
    with Client(home, stopped.address) as unreachable:
        assert unreachable.fetch(repo) == online
        outcome = unreachable.fetch("org/absent")
    assert (outcome.error, outcome.cause) == ("DownloadError", "LocalEntryNotFoundError")
    assert outcome.message.startswith(f"org/absent: no connection to {stopped.address} (ConnectError: ")
    assert "or pass offline=True" in outcome.message
    assert "\n" not in outcome.message


def test_offline_needs_no_readme_that_another_program_left_out(hub: Hub, client: Client) -> None:
    repo = hub.add(PLAIN)
    online = client.fetch(repo)
    assert online.folder is not None
    (online.folder / "README.md").unlink()
    assert client.fetch(repo, offline=True) == online
    (online.folder / "tokenizer.json").unlink()
    assert client.fetch(repo, offline=True).error == "DownloadError"


def test_a_killed_download_looks_incomplete_and_the_next_one_repairs_it(hub: Hub, client: Client, home: Path) -> None:
    repo = hub.add(PLAIN, stalled_file="model.safetensors")
    with Client(home, hub.address) as killed:
        killed.ask(repo)
        assert hub.repos[repo].stalled.wait(30)
    snapshot = home / "hf" / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMITS["main"]
    assert (snapshot / "config.json").is_file()
    assert not (snapshot / "model.safetensors").exists()
    assert client.fetch(repo, offline=True).error == "DownloadError"
    hub.repos[repo].released.set()
    assert client.fetch(repo).files() == PLAIN


def test_a_connection_that_breaks_off_is_taken_up_again(hub: Hub, client: Client) -> None:
    repo = hub.add(PLAIN, stalled_file="model.safetensors")
    client.ask(repo)
    assert hub.repos[repo].stalled.wait(30)
    hub.repos[repo].released.set()
    assert client.outcome().files() == PLAIN


# What goes wrong


@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        (
            {"status": 404, "error_code": "RepoNotFound"},
            ["not found at http", "no such folder here", "check the spelling"],
        ),
        (
            {"status": 401, "error_code": "RepoNotFound"},
            ["or private (HTTP 401)", "accept its licence", "set HF_TOKEN"],
        ),
        ({"status": 403, "error_code": "GatedRepo"}, ["gated (HTTP 403)", "accept it at http", "set HF_TOKEN"]),
        ({"status": 401}, ["access refused (HTTP 401)", "token that may read it", "check the spelling"]),
        ({"status": 403}, ["access refused (HTTP 403)", "token that may read it"]),
        ({"status": 429}, ["too many requests (HTTP 429)", "wait"]),
        ({"status": 500}, ["answered HTTP 500", "try again later", "offline=True"]),
        ({"page": b"<html>Welcome to the hotel</html>"}, ["broke off (JSONDecodeError", "run it again"]),
    ],
)
def test_a_refusal_is_told_in_one_line_that_says_what_to_do(
    hub: Hub, client: Client, answers: dict[str, Any], parts: list[str]
) -> None:
    repo = hub.add(PLAIN, **answers)
    outcome = client.fetch(repo)
    assert (outcome.error, outcome.message.startswith(f"{repo}: ")) == ("DownloadError", True)
    assert [part for part in (*parts, "expected") if part not in outcome.message] == []
    assert "\n" not in outcome.message
    assert outcome.cause is not None


def test_an_unknown_revision_is_named(hub: Hub, client: Client) -> None:
    outcome = client.fetch(hub.add(PLAIN), revision="v9")
    assert outcome.error == "DownloadError"
    assert "no revision 'v9' (HTTP 404); expected a branch, tag or commit of http" in outcome.message


def test_a_file_that_does_not_fit_is_told_with_the_cache_it_was_for(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add(PLAIN)
    with Client(tmp_path, hub.address, max_file_bytes=100_000) as client:
        outcome = client.fetch(repo)
        assert outcome.error == "DownloadError"
        assert f"no room in {tmp_path / 'hf' / 'hub'}" in outcome.message
        assert "File too large" in outcome.message
        assert client.fetch(repo, offline=True).error == "DownloadError"


@pytest.mark.parametrize(
    ("files", "error", "part"),
    [
        ({"lfm-Q4_0.gguf": b"gguf", "README.md": b"#"}, "CheckpointError", "GGUF and ONNX files cannot be used"),
        ({"config.json": b"{}", "model.bin": b"pickle"}, "DownloadError", "no weights, expected model.safetensors"),
        ({**SHARDED, "model.safetensors.index.json": b"[]"}, "CheckpointError", "no usable weight_map"),
        ({name: SHARDED[name] for name in SHARDED if name != SHARDS[1]}, "DownloadError", f"{SHARDS[1]} cannot be had"),
    ],
)
def test_a_repo_without_a_whole_checkpoint_is_told(
    hub: Hub, client: Client, files: dict[str, bytes], error: str, part: str
) -> None:
    outcome = client.fetch(hub.add(files))
    assert outcome.error == error
    assert part in outcome.message


# Local folders

LOCAL = """
import sys
from lfm_mlx.hub import fetch
fetch(sys.argv[1], offline=True)
print("huggingface_hub" in sys.modules)
"""


def test_a_local_folder_does_not_import_the_client(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    command = [sys.executable, "-c", LOCAL, str(folder)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_a_local_folder_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_checkpoint(tmp_path / "org" / "name")
    assert fetch(folder) == folder
    assert fetch(str(folder)) == folder
    assert fetch("~/org/name") == folder
    assert fetch("./org/name") == Path("org/name")
    assert fetch("org/name") == Path("org/name")


def test_local_subfolders_follow_the_same_rules(tmp_path: Path) -> None:
    only = make_checkpoint(tmp_path / "4bit")
    (tmp_path / "assets").mkdir()
    make_checkpoint(tmp_path / ".cache")
    assert fetch(tmp_path) == only
    other = make_checkpoint(tmp_path / "bf16")
    assert fetch(tmp_path, subfolder="bf16") == other
    with pytest.raises(CheckpointError, match="several checkpoints, 4bit, bf16; expected one; add /4bit"):
        fetch(tmp_path)
    with pytest.raises(CheckpointError, match="subfolder 8bit; expected one of: 4bit, bf16"):
        fetch(tmp_path, subfolder="8bit")
    make_checkpoint(tmp_path)
    assert fetch(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "model",
    [
        "./absent",
        "../absent/model",
        "/absent/model",
        "~/absent/model",
        "absent",
        "absent/",
        "",
        "models\\absent",
        "models/absent.gguf",
        Path("org/name"),
        "x" * 5000,
    ],
)
def test_a_local_name_that_does_not_exist_is_told(model: str | Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^not found: .*, expected a folder with config.json or a repo id such as"
    ):
        fetch(model)


@pytest.mark.parametrize("name", ["lfm-Q4_0.gguf", "model.safetensors"])
def test_a_file_is_refused_and_its_folder_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name} is a file; .*name the folder that holds it: {tmp_path}"):
        fetch(tmp_path / name)


def test_an_empty_local_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json, here or one folder below; .*GGUF"):
        fetch(tmp_path)


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(OptionError, match=r"revision is 'main', but .* is a local folder"):
        fetch(tmp_path, revision="main")


@pytest.mark.parametrize("subfolder", ["", "/", "..", "../other", "/etc", "a//b", "a\\b", "./a"])
def test_a_subfolder_that_leads_elsewhere_is_refused(tmp_path: Path, subfolder: str) -> None:
    with pytest.raises(OptionError, match=r"subfolder is .*, expected a folder below"):
        fetch(tmp_path, subfolder=subfolder)


def test_two_different_subfolders_are_refused() -> None:
    with pytest.raises(OptionError, match="subfolder is '8bit', but org/name/4bit names '4bit'"):
        fetch("org/name/4bit", subfolder="8bit")


# Repo ids


@pytest.mark.parametrize("repo_id", ["LiquidAI/LFM2.5-8B-A1B-MLX-4bit", "mlx-community/LFM2-1.2B_4bit", "a/b"])
def test_a_repo_id_is_accepted(repo_id: str) -> None:
    validate_repo_id(repo_id)


@pytest.mark.parametrize(
    "repo_id",
    [
        "name",
        "org/",
        "/name",
        "a/b/c",
        "https://huggingface.co/org/name",
        "org/" + "x" * 97,
        "org/name\n",
        "org/na me",
        "org/na--me",
        "org/na..me",
        "org/name.git",
        "org/-name",
        "org/näme",
    ],
)
def test_another_form_of_repo_id_is_refused_before_the_network(repo_id: str) -> None:
    with pytest.raises(CheckpointError, match="no folder here and no repo id; expected"):
        validate_repo_id(repo_id)


def test_a_revision_in_the_name_is_pointed_to_its_parameter() -> None:
    with pytest.raises(CheckpointError, match="a revision goes into revision="):
        fetch("org/name@v1")
