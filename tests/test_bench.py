import json

from arc_solver import bench


def test_rows_have_one_form(monkeypatch, capsys):
    monkeypatch.setattr(bench, "MEASURED_S", 0.05)
    assert bench.main(["stream", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"rows", "machine", "commit"}
    assert all(set(row) == {"name", "ours", "field", "ratio", "unit"} and row["ours"] > 0 for row in content["rows"])
    assert bench.main(["stream"]) == 0
    assert "tokens/s per core" in capsys.readouterr().out
