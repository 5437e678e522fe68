"""What a run shows while it goes on."""

from dataclasses import replace

from small_runs import STEPS_ALONE, small

from minirl_nb.train import train


def test_live_plot_in_a_notebook(tmp_path, coldstart):
    "A real Jupyter kernel shows one picture and updates it, and no progress bar."
    import nbformat
    from nbclient import NotebookClient

    settings = {
        "model.path": str(coldstart),
        "output.folder": str(tmp_path / "run"),
        "steps": 2,
        "batch.prompts": 2,
        "rollout.responses": 2,
        "rollout.max_new_tokens": 16,
        "evaluation.samples": 1,
        "threads": 1,
    }
    code = f"from minirl_nb.train import load_config, train\nr = train(load_config(None, {settings!r}))"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    outputs = nb.cells[0].outputs
    pictures = [
        o
        for o in outputs
        if o.output_type in ("display_data", "update_display_data")
        and "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 1 and "step/s" not in str(
        [o for o in outputs if o.output_type == "stream"]
    )


def test_a_run_draws_its_curves_where_it_is_asked_to(tmp_path, coldstart):
    words = STEPS_ALONE | {"steps": 2, "output.figure": True}
    result = train(small(tmp_path / "run", coldstart, **words))
    assert result.figure == tmp_path / "run" / "figures" / "curves.png"
    assert result.figure.stat().st_size > 10_000
    assert f"figure:      {result.figure}" in result.report()
    silent = replace(result, figure=None).report()
    assert "figure:" not in silent and "checkpoint:" in silent


def test_auto_says_what_it_took(tmp_path, coldstart, capsys):
    words = STEPS_ALONE | {"objective.replay": "auto", "steps": 2}
    result = train(small(tmp_path / "run", coldstart, **words))
    assert result.replay == "R2" and "auto took R2 (N = 2)" in capsys.readouterr().err
