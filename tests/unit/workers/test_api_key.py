"""The middleware in front of the endpoint, on a bare ASGI application."""

import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fusion_ray.workers.api_key import BearerKey, KeyDigest, read_key


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def client(key: KeyDigest | None, env: str = "TEST_ENDPOINT_KEY") -> TestClient:
    app = Starlette(routes=[Route("/v1/models", hello, methods=["GET", "POST"])])
    app.add_middleware(BearerKey, key=key, api_key_env=env)
    return TestClient(app)


@pytest.mark.parametrize("authorization", ["Bearer secret-1", "bearer secret-1", "Bearer  secret-1 "])
def test_the_right_key_passes(authorization: str) -> None:
    response = client(KeyDigest.of("secret-1")).get("/v1/models", headers={"Authorization": authorization})
    assert (response.status_code, response.text) == (200, "hello")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "secret-1",
        "Bearer",
        "Bearer ",
        "Bearer secret-2",
        "Bearer secret-1x",
        "Basic secret-1",
        "Bearer sécret",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/docs", "/nowhere"])
def test_anything_else_gets_401_in_openais_shape(authorization: str | None, path: str) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    response = client(KeyDigest.of("secret-1")).post(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "secret" not in json.dumps(error)


def test_two_authorization_headers_are_refused() -> None:
    headers = [("Authorization", "Bearer secret-1"), ("Authorization", "Bearer secret-1")]
    assert client(KeyDigest.of("secret-1")).get("/v1/models", headers=headers).status_code == 401


def test_the_key_comes_from_the_environment_of_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_ENDPOINT_KEY", "from-env")
    served = client(None)
    assert served.get("/v1/models", headers={"Authorization": "Bearer from-env"}).status_code == 200
    assert served.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401


def test_no_key_in_the_environment_is_an_error_naming_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_ENDPOINT_KEY", raising=False)
    with pytest.raises(ValueError, match="TEST_ENDPOINT_KEY"):
        client(None).get("/v1/models")


def test_a_mounted_file_holds_the_key_too(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]  # pytest's
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.delenv("TEST_ENDPOINT_KEY", raising=False)
    assert read_key("TEST_ENDPOINT_KEY") is None
    monkeypatch.setenv("TEST_ENDPOINT_KEY_FILE", str(tmp_path / "key"))
    assert read_key("TEST_ENDPOINT_KEY") == "from-file"


def test_the_digest_does_not_hold_the_key_and_is_salted() -> None:
    first, second = KeyDigest.of("secret-1"), KeyDigest.of("secret-1")
    assert "secret-1" not in repr(first)
    assert first.digest != second.digest
    assert first.accepts("secret-1")
    assert not first.accepts("secret-2")
