from torch.utils.file_baton import FileBaton

from zi_experiments.engines.deepspeed.ops import remove_stale_lock


def test_the_lock_of_an_interrupted_build_is_removed(tmp_path, caplog):
    (tmp_path / "lock").touch()

    remove_stale_lock(tmp_path)

    assert not (tmp_path / "lock").exists()
    assert "interrupted" in caplog.text


def test_the_lock_of_a_running_build_is_kept(tmp_path):
    baton = FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()

    remove_stale_lock(tmp_path)

    assert (tmp_path / "lock").exists()
    baton.release()


def test_no_lock_is_no_problem(tmp_path):
    remove_stale_lock(tmp_path)
