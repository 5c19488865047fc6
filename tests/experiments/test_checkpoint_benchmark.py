"""The checkpoint benchmark measures what it says, on a state small enough for a test."""

import json

from experiments.benchmarks import checkpoint


def test_it_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "out" / "checkpoint.json"
    checkpoint.main(["--megabytes", "2", "--rounds", "2", "--folder", str(tmp_path), "--output", str(output)])
    result = json.loads(output.read_text())
    row = result["states"]["2 MB"]
    assert 1.7e6 < row["state_bytes"] < 2.1e6 and len(row["rounds"]) == 2
    assert row["disk_bytes"] > 0.8 * row["state_bytes"]  # random numbers do not compress
    seconds = row["median_seconds"]
    assert 0 < seconds["save_stall"] < seconds["commit"] and seconds["verify_and_restore"] > 0
    assert abs(row["written_mb_per_second"] * seconds["commit"] * 1e6 / row["state_bytes"] - 1) < 0.1
    assert {"hardware", "python", "jax", "orbax"} <= set(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
