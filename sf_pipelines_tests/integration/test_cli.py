"""The command line as a user meets it: real processes, exit codes, what stands on the screen."""

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import sf_pipelines
from sf_pipelines.cli import app
from sf_pipelines.cli.build import DAGSTER_FIELDS
from sf_pipelines.snapshot.config import S3Options
from sf_pipelines.snapshot.routing.cel import CelRouting
from sf_pipelines.snapshot.routing.explicit import ExplicitRouting
from sf_pipelines.snapshot.routing.hash import HashRouting
from sf_pipelines.snapshot.routing.protocol import Routing
from sf_pipelines.snapshot.sharding import CelType
from sf_pipelines.snapshot.store import Store
from sf_pipelines_tests.snapshots import publish_by_hand
from sf_pipelines_tests.tables import clustered, vector_table, write_source

RUNNER = CliRunner()


def run(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = RUNNER.invoke(app, list(arguments), input=stdin, env={"COLUMNS": "160"})
    return result.exit_code, result.output


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    write_source(tmp_path / "source.parquet")
    fields = {
        "name": "small",
        "source": str(tmp_path / "source.parquet"),
        "store": str(tmp_path / "store"),
        "num_dbs": 3,
        "payload_cols": ["title"],
        "vector_spec": {"dim": 16},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_build_search_info_history_verify(config: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    code, text = run("build", str(config))
    assert code == 0, text
    assert "Published" in text
    assert "600 in 3 shards, 0 rejected" in text
    assert "recall@10" in text
    assert "Up to date: " in run("build", str(config))[1]
    assert "seq 2" in run("build", str(config), "--force")[1]

    vector = json.dumps(pq.read_table(tmp_path / "source.parquet")["vector"][5].as_py())
    code, text = run("search", store, vector, "-k", "2", "--json")
    assert code == 0
    assert json.loads(text)[0] == {"id": 5, "score": 0.0, "payload": {"title": "row 5"}}
    assert "row 5" in run("search", store, "-", "-k", "1", stdin=vector)[1]
    (tmp_path / "query.json").write_text(vector)
    assert "row 5" in run("search", store, f"@{tmp_path}/query.json", "--num-probes", "3")[1]

    code, text = run("info", store, "--json")
    assert (code, json.loads(text)["total_vectors"]) == (0, 600)
    assert "cluster" in run("info", store)[1]
    entries = json.loads(run("history", store, "--json")[1])
    assert [entry["current"] for entry in entries] == [True, False]
    assert all(entry["built_at"][:19] == entry["manifest"].split("/")[1][:19] for entry in entries)
    code, text = run("verify", store)
    assert code == 0
    assert "all is well" in text
    assert run("verify", store, "--manifest", entries[1]["manifest"])[0] == 0


def test_verify_exits_with_1_and_names_the_object(config: Path, tmp_path: Path) -> None:
    run("build", str(config))
    victim = next((tmp_path / "store" / "shards").rglob("data/*.lance"))
    victim.write_bytes(victim.read_bytes()[:-1])
    code, text = run("verify", str(tmp_path / "store"))
    assert code == 1
    assert victim.name in text
    assert "1 fault" in text
    code, text = run("verify", str(tmp_path / "store"), "--json")
    found = json.loads(text.splitlines()[-1])
    assert (code, found["passed"], found["recall"]) == (1, False, None)
    assert victim.name in found["faults"][0]


def test_a_gate_that_cannot_be_met_exits_with_1_on_one_line(config: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
    pq.write_table(vector_table(noise, title=["x"] * 600), tmp_path / "source.parquet")
    fields = yaml.safe_load(config.read_text())
    fields["vector_spec"]["sharding"] = {"num_probes": 1}
    config.write_text(yaml.safe_dump(fields))
    done = subprocess.run(
        [sys.executable, "-m", "sf_pipelines.cli", "build", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error [gate.failed]: run ")
    assert re.search(r"is 0\.\d+ below min_recall 0\.95; \d of 3 shards would reach .*Nothing is published yet", line)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store" / "_CURRENT").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere.yaml"], "error [config]: nowhere.yaml cannot be read"),
        (["search", "{tmp}", "what"], "the query is no JSON list of numbers"),
        (["search", "{tmp}", "@{tmp}/nowhere"], "cannot be read"),
        (["search", "{tmp}", "[" * 100_000], "the query is no JSON list of numbers"),
        (["search", "{tmp}", f"[{'9' * 5_000}]"], "the query is no JSON list of numbers"),
        (["verify", "s3:///x"], "has no bucket"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 1
    assert message in " ".join(text.split())
    assert "Traceback" not in text


def test_info_and_history_show_the_judged_recall(config: Path, tmp_path: Path) -> None:
    """One figure everywhere: that of the queries that judged the snapshot."""
    built = json.loads(run("build", str(config), "--json")[1].splitlines()[-1])
    store, recall = str(tmp_path / "store"), f"{built['recall']:.4f}, at least {built['recall_lower']:.4f}"
    text = " ".join(run("info", store)[1].split())
    assert f"recall@10 {recall} (95 % confidence), judged before it was published" in text
    for fact in ("rows 600 in 3 of 3 shards, ", "index flat, lancedb", "columns: payload title", "columns: id int64"):
        assert fact in text
    facts = json.loads(run("info", store, "--json")[1])
    assert (facts["recall"], facts["recall_lower"], facts["recall_k"]) == (built["recall"], built["recall_lower"], 10)
    assert (facts["payload_columns"], facts["id_type"], facts["index_type"]) == (["title"], "int64", "flat")
    assert facts["total_bytes"] == sum(shard["bytes"] for shard in facts["shards"]) == built["bytes"]
    (entry,) = json.loads(run("history", store, "--json")[1])
    assert (entry["rows"], entry["bytes"], entry["index_type"], entry["shards"]) == (600, built["bytes"], "flat", 3)
    assert (entry["recall"]["recall"], entry["recall"]["lower"]) == (built["recall"], built["recall_lower"])
    done = RUNNER.invoke(app, ["history", store], env={"COLUMNS": "220"})
    assert recall in done.output
    # The pointer names another one by now, and this one's manifest is damaged: it is listed all the same.
    run("build", str(config), "--force")
    (tmp_path / "store" / entry["manifest"]).write_bytes(b"no manifest")
    code, text = run("history", store, "--json")
    assert code == 0
    assert [("rows" in entry) for entry in json.loads(text)] == [True, False]


def test_search_like_a_row(config: Path, tmp_path: Path) -> None:
    run("build", str(config))
    store = str(tmp_path / "store")
    vector = pq.read_table(tmp_path / "source.parquet")["vector"][7].as_py()
    by_vector = json.loads(run("search", store, json.dumps(vector), "-k", "4", "--json")[1])
    assert by_vector[0]["id"] == 7
    assert json.loads(run("search", store, "--like", "7", "-k", "3", "--json")[1]) == by_vector[1:]
    for arguments, exit_code, message in (
        (["--like", "9999"], 3, "has id '9999'"),
        (["--like", "seven"], 1, "--like 'seven' is no whole number, which the ids of this snapshot are"),
        (["--like", "7", "[1]"], 2, "give either a query or --like"),
        ([], 2, "give either a query or --like"),
    ):
        code, text = run("search", store, *arguments)
        assert code == exit_code
        assert message in " ".join(text.split())


@pytest.mark.parametrize("root", ["{tmp}", "{tmp}/nowhere"])
@pytest.mark.parametrize(
    "command",
    ["info", "search [1,2]", "get 1", "verify", "history", "pins", "pin x --reason y", "unpin x", "diff", "release",
     "rollback", "rollback --to x"],
)  # fmt: skip
def test_a_root_with_nothing_in_it_is_told_alike(tmp_path: Path, root: str, command: str) -> None:
    name, *rest = command.split()
    code, text = run(name, root.format(tmp=tmp_path), *rest)
    assert code == 3
    (line,) = [line for line in text.splitlines() if line.strip()]
    assert line.startswith("error [reader.no_snapshot]: nothing has been published under")


def test_version_and_short_help() -> None:
    assert run("--version") == (0, f"sf-pipelines {sf_pipelines.__version__}\n")
    assert run("-h")[1] == run("--help")[1]
    assert "Exit codes: 0 done" in run("-h")[1]
    assert "--force" in run("build", "-h")[1]


def test_every_phase_of_a_build_is_named_as_it_begins(config: Path) -> None:
    """No phase may hide in the time of another: a person must see what goes on, libraries that are loaded included."""
    done = subprocess.run(
        [sys.executable, "-m", "sf_pipelines.cli", "build", str(config), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [re.split(r"  +", line.strip()) for line in done.stderr.splitlines()]
    assert [line[0] for line in lines] == [
        "load libraries", "look at the source", "validate and sample", "train routing", "route rows to shards",
        "build shards", "measure recall", "run checks", "publish",
    ]  # fmt: skip
    assert lines[2][2] == "600 rows"
    shown = sum(float(line[1].removesuffix(" s")) for line in lines[1:])
    built = json.loads(done.stdout)
    assert shown == pytest.approx(sum(built["durations"].values()), abs=0.06 * len(lines))
    assert (built["published"], built["rows"], built["k"], built["min_recall"]) == (True, 600, 10, 0.95)
    assert built["recall"] >= built["recall_lower"] >= 0.95
    assert sum(shard["rows"] for shard in built["shards"]) == 600
    assert sum(shard["bytes"] for shard in built["shards"]) == built["bytes"] > 0
    assert {verdict["name"]: verdict["passed"] for verdict in built["verdicts"]}["recall"]


def test_verify_as_json(config: Path, tmp_path: Path) -> None:
    run("build", str(config))
    code, text = run("verify", str(tmp_path / "store"), "--json")
    found = json.loads(text.splitlines()[-1])
    assert (code, found["passed"], found["rows"], found["faults"]) == (0, True, 600, [])
    text = " ".join(run("verify", str(tmp_path / "store"))[1].split())
    assert f"measured now {found['recall']:.4f}, at least {found['recall_lower']:.4f}, of other queries" in text
    judged = found["judged"]
    assert f"recall@10 {judged['recall']:.4f}, at least {judged['lower']:.4f} (95 % confidence; gate 0.95)" in text
    (entry,) = json.loads(run("history", str(tmp_path / "store"), "--json")[1])
    assert entry["recall"] == judged


def test_relative_paths_are_taken_from_the_yaml(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = yaml.safe_load(config.read_text()) | {"source": "source.parquet", "store": "published/small"}
    config.write_text(yaml.safe_dump(fields))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("build", "../small.yaml")[0] == 0
    assert (tmp_path / "published" / "small" / "_CURRENT").is_file()


def a_component(tmp_path: Path, config: Path, **more: Any) -> Path:
    """A component's file as it lies in a Dagster project."""
    fields = yaml.safe_load(config.read_text()) | {"source": "source.parquet", "store": "store"} | more
    (tmp_path / "pyproject.toml").write_text("[tool.dg.project]\nroot_module = 'mine'\n")
    folder = tmp_path / "mine" / "defs" / "small"
    folder.mkdir(parents=True, exist_ok=True)
    document = {"type": "sf_pipelines.components.VectorSnapshotComponent", "attributes": fields}
    (folder / "defs.yaml").write_text(yaml.safe_dump(document))
    return folder / "defs.yaml"


def test_a_component_s_file_is_built_without_dagster(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDS", "2")
    monkeypatch.delenv("TITLE", raising=False)
    path = a_component(
        tmp_path, config, num_dbs="{{ env.SHARDS }}", payload_cols=["{{ env('TITLE', 'title') }}"],
        schedule={"cron": "0 3 * * *"}, engine={"type": "dask"}, tags={"by": "{{ context.who }}"},
    )  # fmt: skip
    script = (
        "import sys; from sf_pipelines.cli import app\n"
        "try: app()\n"
        "finally: assert 'dagster' not in sys.modules, 'Dagster was loaded'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "build", str(path), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "only in Dagster: engine, schedule, tags; --engine says where it is built here" in done.stderr
    assert len(json.loads(done.stdout)["shards"]) == 2
    assert (tmp_path / "store" / "_CURRENT").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_dsb": 3}, "WriteConfig.num_dsb: unknown field"),
        ({"num_dbs": "{{ env.NO_SUCH_VARIABLE }}"}, "attributes.num_dbs: environment variable NO_SUCH_VARIABLE is not"),
        ({"s3_resource": {"region_name": {"env": "NO_SUCH_VARIABLE"}}}, "attributes.s3_resource.region_name: environ"),
        (
            {"name": "{{ context.project_root }}"},
            "attributes.name: only Dagster can fill in {{ context.project_root }}",
        ),
    ],
)
def test_a_component_s_file_that_is_wrong(config: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    code, text = run("build", str(a_component(tmp_path, config, **more)))
    assert code == 1
    assert message in " ".join(text.split())


def test_the_fields_that_are_dagster_s_alone() -> None:
    from sf_pipelines.orchestration.options import SnapshotOptions

    assert set(SnapshotOptions.model_fields) == DAGSTER_FIELDS


def test_an_endpoint_for_a_build(
    config: Path, tmp_path: Path, moto_options: S3Options, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = moto_options.endpoint_url or ""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    upload = Store.open(f"s3://{bucket}/lake", moto_options, create=True)
    upload.put("source.parquet", (tmp_path / "source.parquet").read_bytes())
    named = {"source": f"s3://{bucket}/lake/*.parquet", "store": f"s3://{bucket}/small"}
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | named))
    code, text = run("build", str(config), "--endpoint-url", endpoint)
    assert code == 0, text
    facts = json.loads(run("info", named["store"], "--endpoint-url", endpoint, "--json")[1])
    assert facts["total_vectors"] == 600
    # The same from a component's file, where the resource of Dagster says it.
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("MY_SECRET", "test")
    resource = {
        "endpoint_url": endpoint,
        "region_name": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": {"env": "MY_SECRET"},
    }
    named = {"source": named["source"], "store": f"s3://{bucket}/again", "s3_resource": resource}
    code, text = run("build", str(a_component(tmp_path, config, **named)))
    assert code == 0, text


def test_wrong_fields_are_named(config: Path) -> None:
    config.write_text(config.read_text().replace("num_dbs: 3", "num_dbs: 0\ncolour: red"))
    code, text = run("build", str(config))
    assert code == 1
    flat = " ".join(text.split())
    assert "WriteConfig.num_dbs: should be greater than 0 (got 0)" in flat
    assert "WriteConfig.colour: unknown field" in flat
    assert "red" not in flat


def test_what_is_stored_is_shown_as_it_is(config: Path, tmp_path: Path) -> None:
    rows = vector_table(clustered(60, 16), title=["see [red]this[/red] [/b] [x"] * 60)
    pq.write_table(rows, tmp_path / "source.parquet")
    assert run("build", str(config))[0] == 0
    vector = json.dumps(rows["vector"][0].as_py())
    code, text = run("search", str(tmp_path / "store"), vector)
    assert code == 0
    assert "see [red]this[/red] [/b] [x" in text


# Snapshots put together by hand: what the commands show of each kind.

VECTORS = clustered(40, 4)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SF_PIPELINES_CACHE", str(tmp_path / "cache"))
    return Store.open(tmp_path / "store", create=True)


def by_hand(store: Store, ids: list[Any], routing: Routing, **options: Any) -> str:
    publish_by_hand(store, ids, VECTORS, routing=routing, shard_of=np.arange(40) % 4, **options)
    assert store.local_root is not None
    return str(store.local_root)


def test_a_context_or_shards_name_where_to_search(store: Store) -> None:
    columns: dict[str, CelType] = {"tier": "int", "gold": "bool", "rate": "double", "name": "string", "raw": "bytes"}
    expr = "gold && rate > 1.5 && name == string(raw) ? tier : 0"
    root = by_hand(store, list(range(40)), CelRouting(expr, columns, 4))
    given = [f"--context={pair}" for pair in ("gold=true", "rate=2", "name=a=b", "raw=a=b")]
    query = json.dumps(VECTORS[6].tolist())
    code, text = run("search", root, query, "--json", "-k", "40", "--context", "tier=2", *given)
    assert code == 0, text
    assert sorted(hit["id"] for hit in json.loads(text)) == list(range(2, 40, 4))
    code, text = run("search", root, query, "--json", "-k", "40", "--shard", "1", "--shard", "3")
    assert sorted(hit["id"] for hit in json.loads(text)) == list(range(1, 40, 2))
    code, text = run("info", root)
    facts = json.loads(run("info", root, "--json")[1])
    assert facts["cel_columns"] == columns
    assert (facts["dim"], facts["key_encoding"], facts["shards"][1]["vector_count"]) == (4, None, 10)
    assert datetime.fromisoformat(facts["created_at"]).tzinfo is not None
    assert code == 0
    for fact in ("kind", "vector", "sharding", "cel", "tier: int"):
        assert fact in text
    for arguments, message in (
        ([], "give routing_context"),
        (["--context", "tier=two", *given], "--context tier is a number of type int (got 'two')"),
        (["--context", "tier"], "--context 'tier' is not name=value"),
        (["--context", "gold=yes"], "true or false"),
        (["--context", "tier=1", *given, "--context", "tier=2"], "--context tier is given more than once"),
        (["--context", "colour=red"], "'colour' is unknown"),
        (["--shard", "4"], "shard_ids names 4"),
        (["--num-probes", "2"], "--num-probes is for snapshots sharded by vector; this one is sharded by cel"),
    ):
        code, text = run("search", root, query, *arguments)
        assert code == 1
        assert message in " ".join(text.split())


def test_what_a_terminal_cannot_take_is_escaped(store: Store) -> None:
    payload = {"half": "\ud800", "clear": "\x9b2J", "lines": "a\u2028b", "name": "é"}
    options: dict[str, Any] = {"values": [b"\x1b[2J\nsecond"] * 40, "payloads": [payload] * 40}
    root = by_hand(store, list(range(40)), HashRouting(4), backend="sqlite-vec", key_encoding="u64be", **options)
    query = json.dumps(VECTORS[0].tolist())
    for more, wanted in (([], "\\ud800"), (["--json"], "\\ud800")):
        done = subprocess.run(
            [sys.executable, "-m", "sf_pipelines.cli", "search", root, query, "-k", "1", *more],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "160", "PYTHONIOENCODING": "utf-8"},
        )
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout
        assert "\x9b" not in done.stdout
        assert ("é" in done.stdout) is not bool(more)
    assert json.loads(done.stdout)[0]["payload"] == payload
    text = run("get", root, "7")[1]
    assert "\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "\\nsecond" not in text


def test_values_by_key(store: Store) -> None:
    values = [f"value {at}".encode() for at in range(39)] + [b"\xff\x00"]
    options: dict[str, Any] = {"values": values, "backend": "sqlite-vec", "key_encoding": "u64be"}
    root = by_hand(store, list(range(40)), HashRouting(4), **options)
    code, text = run("get", root, "7", "39", "--json")
    assert (code, json.loads(text)) == (0, {"7": "value 7", "39": "0xff00"})
    code, text = run("get", root, "7", "400")
    assert code == 3
    assert "value 7" in text
    assert "(not there)" in text
    assert json.loads(run("get", root, "400", "--json")[1]) == {"400": None}
    code, text = run("search", root, json.dumps(VECTORS[9].tolist()), "--json", "-k", "1")
    assert (code, json.loads(text)[0]["id"]) == (0, 9)
    code, text = run("info", root, "--json")
    facts = json.loads(text)
    wanted = ("unified", "hash", "sqlite-vec", "u64be", 4)
    assert tuple(facts[name] for name in ("kind", "sharding", "backend", "key_encoding", "num_probes")) == wanted
    for arguments, message in (
        (["seven"], "key 'seven' is not a whole number, which keys of this snapshot are"),
        (["7", "--context", "region=eu"], "routing_context is for snapshots sharded by an expression"),
    ):
        code, text = run("get", root, *arguments)
        assert code == 1
        assert message in " ".join(text.split())


def test_values_by_key_and_context_and_by_bytes(store: Store) -> None:
    keys = [bytes([at, 255]) for at in range(40)]
    options: dict[str, Any] = {"values": keys, "key_encoding": "raw"}
    root = by_hand(store, keys, CelRouting("tier", {"tier": "int"}, 4), **options)
    code, text = run("get", root, "05ff", "--hex", "--context", "tier=1", "--json")
    assert (code, json.loads(text)) == (0, {"05ff": "0x05ff"})
    assert "is not hexadecimal digits" in run("get", root, "5", "--hex", "--context", "tier=1")[1]
    assert "give routing_context" in run("get", root, "05ff", "--hex")[1]


def test_get_names_the_kind_that_it_needs(store: Store) -> None:
    root = by_hand(store, list(range(40)), ExplicitRouting(4))
    code, text = run("get", root, "1")
    assert code == 1
    assert "open it with ShardedVectorReader" in " ".join(text.split())


def test_help_names_every_command() -> None:
    code, text = run("--help")
    assert code == 0
    commands = ("build", "search", "get", "info", "history", "verify")
    for command in (*commands, "rollback", "release", "pin", "unpin", "pins", "cleanup", "diff"):
        assert command in text
        assert run(command, "--help")[0] == 0
