"""Against MLflow's own file store."""

import plait
import pytest
from mlflow.tracking import MlflowClient
from plait import PlaitError
from plait_mlflow.listener import MLflowListener, allowed

PIPELINE = """\
plait: 1
name: tiny
matrix: {seed: [0, 1]}
steps:
  digits: {load-data: "plait.demo.methods:Digits", with: {num_train: 50, num_test: 20}}
  model: {load-model: "plait.demo.methods:SmallClassifier"}
  curve: {transform: "./logging_method.py:Logs", from: {data: digits.train}}
  score: {evaluate: "plait.demo.methods:Accuracy", from: {model: model, data: {clean: digits.test}}}
"""
METHOD = """
import attrs
from plait import PlaitError, hookimpl
@attrs.frozen
class Logs:
    fail: bool = False
    @hookimpl
    def transform(self, data, run):
        if self.fail:
            raise PlaitError("no")
        for i in range(3):
            run.log(step=i, loss=1 / (i + 1))
        run.warn("mind this")
        return data
"""


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "logging_method.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    return MlflowClient(tracking_uri=uri), uri


def only_run(client, name="tiny"):
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return run


def test_a_run_is_logged_whole(mlflow):
    client, uri = mlflow
    result = plait.run("p.yaml", listeners=[MLflowListener(tracking_uri=uri)])
    run = only_run(client)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == result.folder.name
    assert run.data.params["digits_seed_0_.num_train"] == "50"
    value = result["score[seed=1]"].value("accuracy")
    assert run.data.metrics["score_seed_1_/clean/accuracy"] == pytest.approx(value)
    history = client.get_metric_history(run.info.run_id, "curve_seed_0_/loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert run.data.tags["warning.curve_seed_0_"] == "mind this"
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "report.md", "score.csv", "provenance.json", "log.jsonl"} <= artifacts


def test_a_failed_run_is_marked(mlflow):
    client, uri = mlflow
    result = plait.run(
        "p.yaml", ["steps.curve.with.fail=true"], listeners=[MLflowListener(tracking_uri=uri, experiment="other")]
    )
    assert set(result.failed) == {"curve[seed=0]", "curve[seed=1]"}
    assert only_run(client, "other").info.status == "FAILED"


def test_nothing_is_logged_without_an_address(mlflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plait.run("p.yaml", ["matrix.seed=[0]"], listeners=[MLflowListener()])
    assert mlflow[0].get_experiment_by_name("tiny") is None


def test_an_address_that_does_not_work(mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(PlaitError, match="unset MLFLOW_TRACKING_URI"):
        plait.run("p.yaml", listeners=[MLflowListener(tracking_uri="http://127.0.0.1:9")])


def test_names():
    assert allowed("score[seed=0]/µ") == "score_seed_0_/_"
    assert len(allowed("x" * 999)) == 250
