from zi_experiments.runtime import scratch


def test_what_is_no_link_any_more_is_passed_by(tmp_path, monkeypatch):
    """Of runs that begin at once each removes what others have left, and a link between two looks at it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    abandoned = tmp_path / "zi-0123456789ab"
    scratch.Scratch(abandoned)._lock.release()
    (scratch._links() / "0").touch()

    assert scratch.remove_abandoned() == [abandoned]
    assert not abandoned.exists()
