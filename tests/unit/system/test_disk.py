"""Free space for weights in one folder or several."""

from zi_experiments.system import disk


def test_what_is_no_folder_is_told_from_one_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()

    assert disk.folder_problem("--path ", tmp_path) is None
    assert (
        disk.folder_problem("--path ", tmp_path / "file") == f"--path {tmp_path}/file is a file: pass --path /a/folder"
    )
    assert disk.folder_problem("--path ", tmp_path / "none") == (
        f"--path {tmp_path}/none is no folder: mkdir -p {tmp_path}/none, or pass --path /another/folder"
    )
    assert disk.folder_problem("offload.path=", f"{tmp_path}/file/below") == (
        f"offload.path={tmp_path}/file/below cannot be read (Not a directory): pass offload.path=/another/folder"
    )


def test_folders_on_one_disk_share_its_space(tmp_path):
    one, two = (disk.free_bytes([tmp_path / f"made later {n}" for n in range(count)]) for count in (1, 2))

    assert abs(one - two) < 1 << 28, "other processes write meanwhile"


def test_each_drive_takes_an_equal_part(small_disk, tmp_path):
    """So the smaller one limits both."""
    small = disk.free_bytes([small_disk])
    assert small < 512 << 20
    assert abs(disk.free_bytes([tmp_path, small_disk]) - 2 * small) < 1 << 20
