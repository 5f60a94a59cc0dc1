"""The judge against a real server that is slow, fails, replies malformed text and rate-limits."""

from __future__ import annotations

import email.utils
import json
import socket
import time

import pytest

from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.judge.client import KEY, ServerConfig, ServerJudge
from pixellm_jax.evaluation.judge.judge import judge_records
from pixellm_jax.evaluation.judge.prompt import NotJudgedError, make_question
from pixellm_jax.evaluation.judge.report import judge_folder
from pixellm_jax.evaluation.record import read_records
from tests.support.judging import Bad, Server, good_scores, record, serve

SECRET = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set the API key and remove proxies between the test and its server."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(KEY, SECRET)


def judge_of(server: Server, cache, **changes) -> ServerJudge:
    quick = {"initial_pause": 0.01, "max_pause": 0.02, "timeout": 30.0}
    return ServerJudge(ServerConfig(url=server.url, model="m", **quick | changes), cache)


def expected(number: int) -> dict:
    first, second = good_scores(number, 2)  # of the answer's targets: true masks 1 and 0
    return {"judge": "m at {} (prompt 1, temperature 0)", "scores": [second, first]}


def assert_right(server: Server, records) -> None:
    host = server.url.removeprefix("http://").removesuffix("/v1")
    for number, one in enumerate(records):
        wanted = expected(number)
        assert one.judge == wanted | {"judge": wanted["judge"].format(host)}


def mixed_failures(number: int, before: int) -> Bad | None:
    match number % 8:
        case 1:
            return Bad(delay=0.3)
        case 2 if before < 2:
            return Bad(500, b'{"error": {"message": "overloaded"}}')
        case 3 if before < 2:
            return Bad(text="I would say 7 and 3.")
        case 4 if before < 2:
            return Bad(429, b"slow down", headers=(("retry-after", "0.05"),))
        case 5 if before < 1:
            return Bad(hang_up=True)
        case 6 if before < 1:
            return Bad(body=b"<html>Bad gateway</html>")
        case 7 if before < 1:
            return Bad(text='{"1": 7, "2": 12}')
        case _:
            return None


def test_nothing_is_lost_and_no_score_invented(tmp_path):
    records = [record(n) for n in range(24)]
    with serve(Server(mixed_failures)) as server:
        judge = judge_of(server, tmp_path)
        found = judge_records(records, judge)
        assert found.failures == {} and found.stopped is None
        assert_right(server, found.records)
        counts = judge.counts()
        assert counts["requests"] == sum(server.requests_by_question.values())
        assert (counts["server_errors"], counts["malformed"]) == (6, 12)
        assert (counts["rate_limited"], counts["no_connection"]) == (6, 3)
        assert counts["retries"] == 6 + 12 + 3 and "timeouts" not in counts
        assert counts["scored_tokens_in"] == 24 * 100 and counts["scored_tokens_out"] == 24 * 10
        # 24 good replies, and the 9 malformed ones that report their tokens.
        assert counts["tokens_in"] == (24 + 9) * 100
        assert judge.describe()["served"] == ["m-2026"]
        assert set(server.keys) == {f"Bearer {SECRET}"}

        sent = sum(server.requests_by_question.values())
        again = judge_of(server, tmp_path)
        assert judge_records(records, again).records == found.records
        assert sum(server.requests_by_question.values()) == sent
        assert again.counts() == {
            "from_cache": 24,
            "scored_tokens_in": 2400,
            "scored_tokens_out": 240,
        }
        judge_records(records[:1], judge_of(server, tmp_path, temperature=None))
        assert server.requests_by_question[0] == 2 and "temperature" not in server.requests[-1]


def test_a_request_that_times_out_is_retried(tmp_path):
    with serve(Server(lambda number, before: Bad(delay=4) if before < 1 else None)) as server:
        judge = judge_of(server, tmp_path, timeout=1.0)
        assert judge.score(make_question(record(0))) == good_scores(0, 2)
        assert judge.counts()["timeouts"] >= 1 and server.requests_by_question[0] >= 2


def test_failed_questions_are_retried_by_the_next_run(tmp_path):
    lines = [record(n).to_json() + "\n" for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    (tmp_path / "settings.json").write_text('{"mode": "generated"}')
    bad = {2: Bad(500), 5: Bad(text='{"1": 7}'), 7: Bad(400, b'{"error": {"message": "too long"}}')}
    with serve(Server(lambda number, before: bad.get(number))) as server:
        judge = judge_of(server, tmp_path / "cache", max_attempts=3)
        report = judge_folder(tmp_path, judge, 4)
        assert {name.split("/")[2] for name in report.failures} == {"2", "5", "7"}
        assert "500" in report.failures["muse/val/2/0"]
        assert "too long" in report.failures["muse/val/7/0"]
        assert report.judged == 9 and report.scores["all"].questions == 9
        assert (
            server.requests_by_question[2],
            server.requests_by_question[5],
            server.requests_by_question[7],
        ) == (3, 3, 1)
        records = read_records(tmp_path / "questions.jsonl")
        assert [n for n, one in enumerate(records) if one.judge is None] == [2, 5, 7]
        bad.clear()
        report = judge_folder(tmp_path, judge_of(server, tmp_path / "cache"), 4)
        assert report.failures == {} and report.counts["requests"] == 3
        assert_right(server, read_records(tmp_path / "questions.jsonl"))


def test_an_interrupted_run_resumes(tmp_path):
    lines = [record(n).to_json() + "\n" for n in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    (tmp_path / "settings.json").write_text('{"mode": "generated"}')
    calls = []

    def advance():
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    with serve(Server(lambda *_: Bad(delay=0.02))) as server:
        with pytest.raises(KeyboardInterrupt):
            judge = judge_of(server, tmp_path / "cache", workers=3)
            judge_folder(tmp_path, judge, 4, start=lambda count: advance)
        assert (tmp_path / "questions.jsonl").read_text() == "".join(lines)
        judge_folder(tmp_path, judge_of(server, tmp_path / "cache", workers=3), 4)
        assert_right(server, read_records(tmp_path / "questions.jsonl"))
        # At most the three requests in flight were sent twice.
        assert 40 <= sum(server.requests_by_question.values()) <= 43


def test_concurrent_requests_are_limited_to_the_workers(tmp_path):
    with serve(Server(lambda *_: Bad(delay=0.05))) as server:
        judge_records([record(n) for n in range(12)], judge_of(server, tmp_path, workers=3))
        assert 1 < server.max_concurrent <= 3


def test_a_rate_limit_pauses_all_requests(tmp_path):
    limit = Bad(429, headers=(("retry-after", "0.6"),))
    with serve(Server(lambda number, before: limit if len(server.times) == 1 else None)) as server:
        judge = judge_of(server, tmp_path, workers=1)
        found = judge_records([record(n) for n in range(3)], judge)
        assert_right(server, found.records)
        assert server.times[1] - server.times[0] >= 0.6 and len(server.times) == 4


def test_a_rate_limit_without_end(tmp_path):
    with serve(Server(lambda *_: Bad(429))) as server:
        judge = judge_of(server, tmp_path, max_rate_limits=4)
        with pytest.raises(NotJudgedError, match="rate limit, 4 times"):
            judge.score(make_question(record(0)))
        assert server.requests_by_question[0] == 4


DOWN = [
    (Bad(401, b'{"error": {"message": "no"}}'), "401"),
    (Bad(404, b'{"error": {"message": "no such model"}}'), "no such model"),
    (Bad(429, b'{"error": {"message": "no", "code": "insufficient_quota"}}'), "used up"),
    (Bad(429, headers=(("retry-after", "3600"),)), "a pause of 3600 s"),
    (Bad(429, headers=(("retry-after", "Fri, 01 Jan 2100 00:00:00 GMT"),)), "a pause of"),
]


def test_a_server_that_refuses_everything_gets_one_request(tmp_path):
    for number, (bad, message) in enumerate(DOWN):
        with serve(Server(lambda *_, bad=bad: bad)) as server:
            judge = judge_of(server, tmp_path / str(number), workers=1)
            found = judge_records([record(n) for n in range(5)], judge)
            assert message in found.stopped
            assert len(server.times) == 1 and len(found.failures) == 5
            assert all(one.judge is None for one in found.records)


def test_an_invalid_retry_after_means_no_wait(tmp_path):
    past = email.utils.formatdate(time.time() - 60, usegmt=True)
    for number, value in enumerate((past, "soon", "nan", "-5")):
        limit = Bad(429, headers=(("retry-after", value),))
        with serve(Server(lambda _, before, limit=limit: limit if before < 1 else None)) as server:
            judge = judge_of(server, tmp_path / str(number))
            assert judge.score(make_question(record(0))) == good_scores(0, 2)


def test_the_key_is_written_nowhere(tmp_path):
    """Even where the server sends it back."""
    lines = [record(n).to_json() + "\n" for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    (tmp_path / "settings.json").write_text('{"mode": "generated"}')
    echo = {
        0: Bad(400, json.dumps({"error": {"message": f"bad key {SECRET}"}}).encode()),
        1: Bad(text=f"Your key {SECRET}"),
        2: Bad(body=f"{'x' * 75}{SECRET}".encode()),
        3: Bad(extra=(("model", f"m {SECRET}"),)),
    }
    with serve(Server(lambda number, before: echo[number])) as server:
        report = judge_folder(tmp_path, judge_of(server, tmp_path / "cache", max_attempts=1), 4)
    assert len(report.failures) == 3 and report.settings["served"] == ["m [key]"]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET[:8] not in path.read_text()


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        url = f"http://localhost:{free.getsockname()[1]}/v1"
        config = ServerConfig(url=url, model="m", max_attempts=2, initial_pause=0.01)
        judge = ServerJudge(config, tmp_path)
        with pytest.raises(NotJudgedError, match="no connection"):
            judge.score(make_question(record(0)))
    assert judge.counts() == {"no_connection": 2, "requests": 2, "retries": 1}


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host/v1", "http://", "http://me:pw@host/v1", "http://host:x/v1"],
)
def test_a_wrong_url_is_refused(url):
    with pytest.raises(InputError, match="URL"):
        ServerConfig(url=url, model="m")


def test_a_wrong_key_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY, "sk-ä")
    with pytest.raises(InputError, match=KEY):
        ServerJudge(ServerConfig(url="http://localhost/v1", model="m"), tmp_path)


def test_a_local_server_needs_no_key(monkeypatch, tmp_path):
    monkeypatch.delenv(KEY)
    with serve(Server()) as server:
        assert judge_of(server, tmp_path).score(make_question(record(0))) == good_scores(0, 2)
        assert server.keys == ["Bearer none"]
