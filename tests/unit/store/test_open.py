"""Opening a store: fresh, present, newer, damaged, forbidden, and by many at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

import llmo.store
from llmo.errors import EnvironmentProblem, SpecError, StorageError
from llmo.store import Store, migrate
from llmo.store.db import url_of
from llmo.store.schema import metadata
from llmo.types import Kind, Needs

sqlite_only = pytest.mark.skipif("os.environ.get('LLMO_TEST_POSTGRES')", reason="about the SQLite file")


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that other users can reach too."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_fresh_home_has_exactly_the_tables_of_the_schema(home, url) -> None:
    with Store.open(home, url):
        pass
    engine = create_engine(url_of(home, url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_the_known_revisions_are_those_of_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(llmo.store.__file__).parent / "migrations"))
    script = ScriptDirectory.from_config(config)
    assert [r.revision for r in script.walk_revisions()][::-1] == list(migrate.REVISIONS)
    assert script.get_heads() == [migrate.HEAD]


def test_opening_a_present_home_does_not_import_alembic(store) -> None:
    code = (
        "import sys; from pathlib import Path; from llmo.store import Store\n"
        f"Store.open(Path({str(store.home)!r}), {store._db.url.render_as_string(hide_password=False)!r}).close()\n"
        "print([m for m in sys.modules if m.startswith(('alembic', 'torch', 'pydantic'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_was_written_is_there_after_opening_again(home, url) -> None:
    with Store.open(home, url) as store:
        made = store.jobs.insert(op="train", spec={"a": [1, "ü", None]}, inputs={"d": "sha256:0"}, needs=Needs(cores=2))
    with Store.open(home, url) as store:
        assert store.jobs.get(made.id) == made


@sqlite_only
def test_sqlite_is_set_so_that_acknowledged_rows_survive_a_power_cut(store) -> None:
    with store._db.read() as connection:
        asked = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in asked}
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


@sqlite_only
def test_writers_begin_immediately(store) -> None:
    with store._db.write(), create_engine(store._db.url).connect() as other:
        other.exec_driver_sql("PRAGMA busy_timeout = 0")
        with pytest.raises(Exception, match="locked"):
            other.exec_driver_sql("BEGIN IMMEDIATE")
        other.engine.dispose()


def test_many_processes_open_a_fresh_home_at_once(home, actors) -> None:
    assert actors.together(*[("open_home", str(home))] * 4) == [[]] * 4


def test_a_database_newer_than_the_code_is_refused(home, url) -> None:
    with Store.open(home, url) as store, store._db.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match=r"newer LLMO .*'9999'") as caught:
        Store.open(home, url)
    assert "upgrade" in caught.value.hint


def test_a_migration_that_is_cut_off_leaves_nothing(home, url, monkeypatch) -> None:
    home.mkdir()
    monkeypatch.setattr("alembic.op.create_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Store.open(home, url)
    monkeypatch.undo()
    with Store.open(home, url) as store:
        assert store.jobs.list() == []


@sqlite_only
def test_a_file_that_is_no_database_is_refused(home) -> None:
    home.mkdir()
    (home / "llmo.db").write_bytes(b"these are not the bytes you are looking for" * 100)
    with pytest.raises(StorageError, match="damaged or is not a database") as caught:
        Store.open(home)
    assert caught.value.hint


def test_a_home_that_is_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "home").write_text("a file")
    for home in (tmp_path / "home", tmp_path / "home" / "below"):
        with pytest.raises(StorageError, match="is not a folder"):
            Store.open(home)


@pytest.mark.parametrize("url", ["not a url", "sqlite://", "sqlite:///:memory:"])
def test_a_wrong_database_url_is_an_error_that_names_the_variable(home, url) -> None:
    with pytest.raises(SpecError) as caught:
        Store.open(home, url)
    assert caught.value.where == "LLMO_DATABASE"


def test_a_database_without_its_driver_is_an_error_that_says_what_to_install(home) -> None:
    with pytest.raises(EnvironmentProblem, match="oracle2") as caught:
        Store.open(home, "oracle2://user:secret@host/x")
    assert "secret" not in caught.value.what


@pytest.mark.parametrize("name", ["a%20b", "q?x=1", "h#1", "with space", "数据"])
@sqlite_only
def test_any_folder_name_will_do(tmp_path, name) -> None:
    with Store.open(tmp_path / name):
        assert (tmp_path / name / "llmo.db").is_file()


def test_a_home_is_closed_to_other_users(home, store) -> None:
    assert home.stat().st_mode & 0o077 == 0


def test_no_permission_to_make_the_home(common, actors) -> None:
    common.chmod(0o555)
    [told] = actors.together(("unprivileged", str(common / "home"), None))
    common.chmod(0o755)
    assert told["code"] == "storage"
    assert "no permission" in told["what"]
    assert list(common.iterdir()) == []


@sqlite_only
def test_no_permission_to_write_the_home(common, actors) -> None:
    Store.open(common / "home").close()
    for path in [common / "home", *(common / "home").iterdir()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    [told] = actors.together(("unprivileged", str(common / "home"), str(common)))
    (common / "home").chmod(0o755)
    assert told["code"] == "storage"
    assert "no permission" in told["what"]
    assert told["hint"]


@sqlite_only
def test_no_room_for_the_database(home, actors) -> None:
    with Store.open(home) as store:
        before = store.usage()["database_bytes"]
    [[acknowledged, told]] = actors.together(("small_database", str(home), before + 200_000))
    assert told["code"] == "storage"
    assert told["hint"]
    with Store.open(home) as store:
        assert [job.id for job in store.jobs.list(limit=None, newest_first=False)] == acknowledged
    assert acknowledged


def test_usage_counts_rows_bytes_and_states(store, new_job, folder) -> None:
    job = new_job()
    new_job(parent=job.id, child_key="a")
    store.jobs.request_stop(job.id)
    store.catalog.publish(Kind.MODEL, "m", folder(a="12345", b="123"), {}, job=job.id, inputs={})
    usage = store.usage()
    assert (usage["blobs"], usage["blob_bytes"], usage["folders"]) == (2, 8, 1)
    assert usage["jobs"] == {"stopped": 2}
    assert usage["artifacts"] == {"model": 1}
    assert usage["rows"]["jobs"] == 2


@sqlite_only
def test_a_busy_database_says_so(home, monkeypatch) -> None:
    monkeypatch.setattr("llmo.store.db.BUSY_SECONDS", 0)
    with Store.open(home) as one, Store.open(home) as other, one._db.write(), pytest.raises(StorageError, match="busy"):
        other.jobs.insert(op="x", spec={}, inputs={}, needs=Needs())
