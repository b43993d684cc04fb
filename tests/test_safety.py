"""No code comes with data, no secret is written down, nobody else can write, and no name leaves its folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Run
from transformers import LlamaConfig

from retrace import worker
from retrace.core import checkpoint, files, snapshot, squeue
from retrace.core.config import SlurmJobs, validate
from retrace.core.files import read_json, write_json
from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.safety import own_folder, redact
from retrace.core.slurm import _only_ours
from retrace.core.store import RunDir, Store
from retrace.core.tasks import read_task
from retrace.core.texts import LocalText
from retrace.papers.mm1 import corpora
from retrace.papers.mm1.decoder import load_decoder
from retrace.papers.mm1.encoder import load_encoder
from retrace.papers.quietstar.config import TASKS, ThoughtConfig
from retrace.papers.quietstar.pretrained import write_thoughts
from retrace.papers.quietstar.trunks import load_trunk

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["seed=0", "base.optim.steps=3", "train.optim.steps=2", "eval.num_questions=2", "eval.num_windows=2"]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_RecognisableTokenOfTheTest",
    "AWS_SECRET_ACCESS_KEY": "recognisable/secret+of=the@test",
}
IN_REMOTE = "recognisablePasswordOfTheRemote"


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@dataclass(frozen=True)
class Trap:
    """A file that must not be unpickled, and where that would be seen."""

    file: Path
    marker: Path

    def lay(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(self.file.read_bytes())

    @property
    def sprung(self) -> bool:
        return self.marker.exists()


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    """A pickle that does harm when it is loaded, which is tried first."""
    made = Trap(tmp_path / "bomb.pt", tmp_path / "sprung")
    torch.save(Bomb(made.marker), made.file)
    torch.load(made.file, weights_only=False)
    assert made.sprung
    made.marker.rmdir()
    yield made
    assert not made.sprung


def tiny_llama(folder: Path, **more: Any) -> Path:
    LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**settings, "architectures": ["LlamaForCausalLM"], **more})
    return folder


@pytest.mark.parametrize("load", [load_trunk, load_decoder])
def test_pickled_weights_are_refused_unread(load: Any, trap: Trap, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    trap.lay(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"model: no model\*\.safetensors: other formats can hold code and are not read"
    ):
        load(str(folder))


def test_pickled_weights_of_an_image_encoder_are_refused_unread(trap: Trap, tmp_path: Path) -> None:
    trap.lay(tmp_path / "model" / "pytorch_model.bin")
    write_json(tmp_path / "model" / "config.json", {"model_type": "clip_vision_model"})
    with pytest.raises(ValueError, match=r"model: no model\*\.safetensors"):
        load_encoder(str(tmp_path / "model"))


def test_a_pickle_named_safetensors_is_refused_in_one_sentence(trap: Trap, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    trap.lay(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model: .*header") as caught:
        load_trunk(str(folder))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_by_the_command_before_anything_starts(
    trap: Trap, tmp_path: Path, home: Path, retrace: Run
) -> None:
    folder = tiny_llama(tmp_path / "model")
    trap.lay(folder / "pytorch_model.bin")
    thoughts = ThoughtConfig(num_sampled=2, num_true=2, num_thoughts=2, policy_weight=1.0)
    write_thoughts(folder, thoughts, {}, hidden_tokens=[])
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    text = [f"corpus.{use}=[{{kind: local, path: text.jsonl}}]" for use in ("continued", "heldout")]
    for words in (
        ["run", "quietstar/main", "scale=paper", "hardware=cpu", f"model.name={folder}", *text, "eval.tasks=[]"],
        ["think", str(folder), "some text"],
    ):
        done = retrace(*words, HF_HUB_OFFLINE="1", RETRACE_DATA=str(tmp_path))
        assert done.returncode == 2
        assert "no model*.safetensors: other formats can hold code and are not read" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (home / "runs").exists()


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(trap: Trap, tmp_path: Path) -> None:
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    folder = tiny_llama(tmp_path / "model", model_type="own_kind", auto_map=code)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(trap.marker)!r})\nclass Config: ...\nclass Model: ...\n")
    (folder / "model.safetensors").write_bytes(b"")
    for load in (load_trunk, load_decoder):
        with pytest.raises(ValueError, match="needs code of its own, which is never run") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)


def test_pickles_among_checkpoints_are_not_read(trap: Trap, tmp_path: Path) -> None:
    """Also where whoever planted them gave them a manifest that fits."""
    step = tmp_path / "checkpoints" / "step_00000007"
    for name in ("tensors.safetensors", "optimizer.pt", "state.json"):
        trap.lay(step / name)
    size, digest = trap.file.stat().st_size, files.fingerprint(trap.file)
    write_json(step / "manifest.json", {"tensors.safetensors": [size, digest], "state.json": [size, digest]})
    assert checkpoint.newest(step.parent)[0] == -1
    assert not step.exists()


def test_pickled_arrays_among_data_are_refused_by_name(
    trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    for name in ("texts/a.npy", "shards/a.npy", "shards/b.pkl"):
        trap.lay(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.npy: not a text source"):
        LocalText(kind="local", path="texts/a.npy").file()
    for pattern in ("shards/*.npy", "shards/*.pkl"):
        local = corpora.LocalShards(kind="shards", pattern=pattern, document="caption")
        with pytest.raises(ValueError, match="expected files that all end in one of"):
            local.files()


@pytest.mark.parametrize("member", ["npy", "npz", "pth", "pt", "pickle", "pyd"])
def test_a_pickle_in_a_shard_of_images_is_not_loaded(
    member: str, trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(trap.file, f"one.{member}")
    local = corpora.LocalShards(kind="shards", pattern="a.tar", document="caption")
    with pytest.raises(ValueError, match="no row that can be read|no field") as caught:
        corpora.check(local)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Ended:
    """A sweep under secrets and with umask 0."""

    home: Path
    printed: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Three smoke runs with offline W&B, called from a checkout whose remote has a password in it."""
    place = tmp_path_factory.mktemp("secrets")
    remote = f"https://someone:{IN_REMOTE}@localhost/x.git"
    for words in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", "-C", str(place), *words], check=True)
    environment = {**os.environ, **SECRETS, "RETRACE_HOME": str(place / "home"), "WANDB_MODE": "offline"}
    words = ["run", "quietstar/main", "scale=smoke", "tracking.wandb=auto", *SMALL]
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-m", "retrace.cli", *words],
        cwd=place, env=environment, umask=0, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Ended(place / "home", done.stdout + done.stderr)


def test_no_file_of_a_run_holds_a_secret_not_even_those_of_wandb(ended: Ended) -> None:
    files = [path for path in ended.home.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if path.name == "record.json"]
    for secret in (*SECRETS.values(), IN_REMOTE):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert secret not in ended.printed


def test_nobody_else_can_write_what_a_run_wrote_whatever_the_umask(ended: Ended) -> None:
    paths = [path for path in ended.home.rglob("*") if not path.is_symlink()]
    assert len(paths) > 30
    assert not [path for path in (ended.home, *paths) if path.stat().st_mode & 0o022]


def test_a_secret_in_a_config_is_refused_and_not_repeated(home: Path, retrace: Run) -> None:
    for override in (
        f"tracking.project={SECRETS['HF_TOKEN']}",
        f"nothing={SECRETS['HF_TOKEN']}",
        "tracking.project='https://me:password@host'",
    ):
        done = retrace("run", "quietstar/main", *TINY, override, **SECRETS)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert SECRETS["HF_TOKEN"] not in done.stderr + done.stdout
    assert not home.exists()


def test_a_key_in_the_netrc_file_is_a_secret_as_well(home: Path, retrace: Run, tmp_path: Path) -> None:
    key = SECRETS["WANDB_API_KEY"]
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {key}\n")
    (tmp_path / ".netrc").chmod(0o600)
    done = retrace("run", "quietstar/main", *TINY, f"tracking.entity={key}", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "holds the value of ~/.netrc for api.wandb.ai" in done.stderr
    assert key not in done.stderr + done.stdout
    assert not home.exists()


def slurm_jobs(**given: Any) -> SlurmJobs:
    settings = {
        "partition": None, "account": None, "qos": None, "minutes": 60, "nodes": 1, "memory_gb": None,
        "array_parallelism": 1, "runs_per_job": 1, "signal_seconds": 60, "max_requeues": 1, "setup": [], "extra": [],
    }  # fmt: skip
    return validate(SlurmJobs, {**settings, **given}, source="slurm")


def test_a_job_script_with_a_secret_is_refused_and_one_that_reads_it_is_not() -> None:
    for given in ({"setup": ["export HF_TOKEN=hf_abc"]}, {"extra": ["--export=ALL,WANDB_API_KEY=0123"]}):
        with pytest.raises(ValueError, match="HF_TOKEN|WANDB_API_KEY") as caught:
            slurm_jobs(**given)
        assert "hf_abc" not in str(caught.value)
        assert "0123" not in str(caught.value)
    assert slurm_jobs(setup=["export HF_TOKEN=$(cat ~/.token)", "export NCCL_SOCKET_IFNAME=ib0"]).setup


def test_a_secret_in_an_error_is_replaced_also_where_it_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x01value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "notasecret")
    header = repr(b"Bearer hf_secret\x01value")
    told = redact(f"Illegal header value {header} of https://a:b@host/x, notasecret")
    assert told == "Illegal header value b'Bearer <HF_TOKEN>' of https://<credentials>@host/x, notasecret"


def test_a_run_that_fails_with_a_secret_in_its_error_writes_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP libraries quote a header that they refuse, and the token is in one."""
    token = "hf_secret\x01value"
    monkeypatch.setenv("HF_TOKEN", token)
    error = RuntimeError(f"Illegal header value {token.encode()!r}")
    with worker._logging_to(tmp_path / "log.txt"):
        logging.getLogger("httpx").warning("sending %r", token)
    try:
        raise error
    except RuntimeError as caught:
        outcome = worker._failed(RunDir(tmp_path), None, caught)
    assert outcome.reason == "RuntimeError: Illegal header value b'<HF_TOKEN>'"
    result = (tmp_path / "result.json").read_text()
    assert "Traceback" in result
    assert "<HF_TOKEN>" in (tmp_path / "log.txt").read_text()
    assert not [path for path in tmp_path.iterdir() if "hf_secret" in path.read_text()]


BAD_NAMES = ["../up", "/etc/passwd", "a/b", "nul\0byte", "x" * 300, "", ".hidden", "line\nbreak"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_from_configs_and_records_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    given = {"name": "a", "question": "?", "locus": "-", "base": "demo/main", "seeds": [0], "baseline": "one"}
    arms = {"one": []}
    assert validate(Ablation, {**given, "arms": arms}, source="test")
    for wrong in ({"name": name}, {"arms": {**arms, name: []}}, {"base": f"demo/{name}"}):
        with pytest.raises(ValueError):
            validate(Ablation, {**given, "arms": arms, **wrong}, source="test")
    (tmp_path / "tasks").mkdir()
    if name and "\0" not in name and len(name) < 200:
        (tmp_path / "up.yaml").write_text("task: ../up\ntest_split: test\n")  # what `../up` would find
    with pytest.raises(ValueError, match="no such task"):
        read_task(name, tasks_dir=tmp_path / "tasks")
    with pytest.raises(ValueError, match="no such task"):
        read_task(name, tasks_dir=TASKS)
    record = {
        "schema": 1, "id": "demo-train-1", "paper": "demo", "program": "train", "recipe": 1, "labels": [],
        "scale": "smoke", "seed": 0, "status": "DONE", "config": {}, "parents": {}, "metrics": {}, "series": {},
        "cost": {}, "provenance": {}, "pages": ["page"],
    }  # fmt: skip
    assert Record.model_validate_json(json.dumps(record))
    for wrong in ({"id": name}, {"paper": name}, {"pages": [name]}):
        write_json(tmp_path / "record.json", {**record, **wrong})
        with pytest.raises(ValueError, match=r"record\.json: not a record"):
            Record.load(tmp_path / "record.json")


def test_a_command_with_such_a_name_writes_nothing_outside(tmp_path: Path, retrace: Run) -> None:
    for words in (
        ["run", "quietstar/../../x", *TINY],
        ["run", "../quietstar/main", *TINY],
        ["run", "quietstar/main", "scale=../scale/smoke"],
        ["run", "quietstar/main", *TINY, "eval.tasks=[../../../tmp/x]"],
        ["run", "quietstar/main", *TINY, f"eval.tasks=[{'x' * 300}]"],
        ["run", "quietstar/main", *TINY, "hardware=../hardware/cpu"],
        ["report", "../quietstar"],
        ["report", "quietstar", "--scale", "../smoke"],
    ):
        done = retrace(*words)
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_task_may_include_files_of_lm_eval_only(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\n")
    inside = os.path.relpath(tmp_path / "own.yaml", Path(torch.__file__).parents[1])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(f"task: own\ninclude: lm_eval/../{inside}\n")
    with pytest.raises(ValueError, match="expected lm_eval/"):
        read_task("own", tasks_dir=tmp_path / "tasks")


def test_a_folder_of_jobs_is_closed_to_others_and_one_of_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / ".slurm"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    tmp_path.joinpath("runs").chmod(0o777)
    own_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.parent.stat().st_mode & 0o022
    if os.getuid() == 0:  # only root can give a folder away
        os.chown(folder.parent, 12345, -1)
        with pytest.raises(ValueError, match="belongs to another user"):
            own_folder(folder)


def test_a_job_ends_before_it_reads_a_folder_that_others_can_write_in(tmp_path: Path) -> None:
    line = _only_ours(tmp_path)

    def job() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", f"{line}\necho read it"], capture_output=True, text=True)

    tmp_path.chmod(0o777)
    assert (job().returncode, job().stdout) == (1, "")
    assert "others can write in it" in job().stderr
    tmp_path.chmod(0o700)
    assert job().stdout == "read it\n"


def test_snapshots_that_no_job_needs_are_removed_and_the_others_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = ("needed", "ended", "fresh", "elsewhere", "forgotten")
    needed, ended, fresh, elsewhere, forgotten = (store.runs / ".snapshots" / name for name in names)
    for path, age in ((needed, 1e6), (ended, 1e6), (fresh, 60), (elsewhere, 1e6), (forgotten, 1e7)):
        (path / "src").mkdir(parents=True)
        os.utime(path, (time.time() - age, time.time() - age))
    runs = [store.run(name) for name in ("a", "b", "c", "d")]
    squeue.note(runs[0], job="1_0", name="retrace-1", logs=tmp_path, snapshot=needed)
    squeue.note(runs[0], job="2_0", name="retrace-2", logs=tmp_path, snapshot=fresh)  # the first is still there
    squeue.note(runs[1], job="3_0", name="retrace-3", logs=tmp_path, snapshot=ended)
    runs[1].finish("DONE")
    squeue.note(runs[2], job="1_0", name="retrace-4", logs=tmp_path, snapshot=elsewhere)  # in another cluster's queue
    squeue.note(runs[3], job="5_0", name="retrace-5", logs=tmp_path, snapshot=forgotten)
    note = runs[3].path / "slurm.json"
    (entry,) = read_json(note)
    long_ago = datetime.now(UTC) - 2 * squeue.FORGOTTEN
    write_json(note, [{**entry, "submitted": long_ago.isoformat()}])
    jobs = {"1_0": squeue.QueuedJob("1_0", "RUNNING", 0, "n1", "", "retrace-1")}
    assert snapshot.prune(store, needed=squeue.needed_snapshots(runs, jobs)) == [ended, forgotten]
    assert all(path.is_dir() for path in (needed, fresh, elsewhere))
