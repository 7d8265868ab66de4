"""Free space for weights in one folder or several."""

from zi_experiments.system import disk


def test_folders_on_one_disk_share_its_space(tmp_path):
    one, two = (disk.free_bytes([tmp_path / f"made later {n}" for n in range(count)]) for count in (1, 2))

    assert abs(one - two) < 1 << 28, "other processes write meanwhile"


def test_each_drive_takes_an_equal_part(small_disk, tmp_path):
    """So the smaller one limits both."""
    small = disk.free_bytes([small_disk])
    assert small < 512 << 20
    assert abs(disk.free_bytes([tmp_path, small_disk]) - 2 * small) < 1 << 20
