"""Task files: what is refused, in which words, and how soon."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import yaml

from retrace.core.evaluate import _load, evaluate_task
from retrace.core.tasks import list_tasks, read_rows, read_task, validate_tasks

HUB = {"dataset_path": "someone/sums", "test_split": "test", "metadata": {"local": {"test": "sums/test.jsonl"}}}


def write(folder, name, **settings):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | settings))


def check(folder, name, **options):
    validate_tasks([name], **{"tasks_dir": folder, "data_dir": None, "generated": ["made"]} | options)


def test_the_files_are_the_list(tmp_path):
    write(tmp_path, "made", test_split="test")
    write(tmp_path, "sums", **HUB)
    assert list_tasks(tmp_path) == ["made", "sums"]
    check(tmp_path, "made")
    check(tmp_path, "sums")
    with pytest.raises(ValueError, match="sum: no such task; the tasks are: made, sums"):
        check(tmp_path, "sum")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "other", "dataset_path": "a/b"}, "task='other': expected 'wrong', as the file is called"),
        ({"include": "lm_eval/tasks/nothing.yaml"}, "no such file; expected lm_eval/... of the installed lm-eval"),
        ({"include": "/etc/passwd.yaml"}, "no such file; expected lm_eval/... of the installed lm-eval"),
        ({"dataset_path": "a/b", "metadata": {"allowed": [0, 1]}}, "expected a list of quoted answers"),
        ({"dataset_path": "a/b", "metadata": {"allowed": []}}, "expected a list of quoted answers"),
        ({"dataset_path": "a/b", "metadata": {"allowed": ["0"]}}, "output_type=None: expected loglikelihood"),
        (
            {"dataset_path": "a/b", "output_type": "loglikelihood", "metadata": {"allowed": ["0"]}},
            "doc_to_text and doc_to_target are expected",
        ),
        ({"dataset_path": "a/b", "metadata": {"subset": {"size": 128}}}, "expected numbers, as in {shuffle_seed: 42"),
        ({"dataset_path": "a/b", "metadata": {"subset": 128}}, "expected numbers, as in {shuffle_seed: 42"),
        ({"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "a.jsonl"}}}, "use metadata.local"),
        ({}, "test_split is missing"),
        ({"test_split": "test"}, "its rows are not generated; those that are: made"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, settings, message):
    write(tmp_path, "wrong", **settings)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check(tmp_path, "wrong")


def test_python_in_a_task_file_is_refused(tmp_path):
    (tmp_path / "wrong.yaml").write_text("task: wrong\nprocess_docs: !function utils.process\n")
    with pytest.raises(ValueError, match=r"wrong\.yaml, line 2: not readable as YAML"):
        check(tmp_path, "wrong")


def test_local_rows(tmp_path):
    write(tmp_path, "sums", **HUB)
    with pytest.raises(ValueError, match=r"sums/test\.jsonl is missing: put it there, or unset RETRACE_DATA"):
        check(tmp_path, "sums", data_dir=tmp_path)
    path = tmp_path / "sums" / "test.jsonl"
    path.parent.mkdir()
    path.write_text('{"question": "a\u2028b"}\n\n{"question": "c"}\n', encoding="utf-8")
    check(tmp_path, "sums", data_dir=tmp_path)
    task = read_task("sums", tasks_dir=tmp_path)
    assert read_rows(task, data_dir=tmp_path, generated={}) == {"test": [{"question": "a\u2028b"}, {"question": "c"}]}
    for text, message in (("", "no rows in it"), ("question: a\n", "test.jsonl: line 1 is not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(task, data_dir=tmp_path, generated={})


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid"])
def test_a_hub_out_of_reach_fails_within_seconds(tmp_path, monkeypatch, endpoint):
    write(tmp_path, "sums", **HUB)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    check(tmp_path, "sums")  # a plan asks nobody
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"can't be reached; set RETRACE_DATA to a folder with sums/test\.jsonl"):
        check(tmp_path, "sums", probe_hub=True)
    with pytest.raises(ValueError, match="can't be reached"):
        evaluate_task("sums", scorers={"": None}, seed=0, tasks_dir=tmp_path, data_dir=None, generated={})
    assert time.monotonic() - start < 14  # twice HUB_SECONDS, and an import


def test_a_cached_dataset_is_read_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    source = {"dataset_path": str(tmp_path / "mirror"), "dataset_kwargs": {"cache_dir": str(tmp_path / "cache")}}
    write(tmp_path, "sums", **source, test_split="test", doc_to_text="{{question}}", doc_to_target="{{answer}}")
    task = _load(read_task("sums", tasks_dir=tmp_path), rows=None)
    assert [task.doc_to_text(doc) for doc in task.eval_docs] == ["1 + 1?"]


def test_offline_without_a_cached_dataset_names_the_way_out(tmp_path):
    write(tmp_path, "sums", **HUB)
    code = (
        "from pathlib import Path; from retrace.core.evaluate import evaluate_task;"
        f"evaluate_task('sums', scorers={{'': None}}, seed=0, tasks_dir=Path({str(tmp_path)!r}),"
        "data_dir=None, generated={})"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: sums: its data did not come from the hub"), ended.stderr
    assert "set RETRACE_DATA to a folder with sums/test.jsonl" in last


def test_checking_imports_neither_torch_nor_lm_eval(tmp_path):
    write(tmp_path, "gsm8k", include="lm_eval/tasks/gsm8k/gsm8k.yaml")
    code = (
        "import sys; from pathlib import Path; from retrace.core.tasks import validate_tasks;"
        f"validate_tasks(['gsm8k'], tasks_dir=Path({str(tmp_path)!r}), data_dir=None, generated=[]);"
        "assert not {'torch', 'lm_eval', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
