"""What libraries raise is told apart by what the server said."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import Any

import pytest

from expstate.errors import InvalidArgumentError, NoSpaceError, StorageError, StoragePermissionError
from expstate.storage.objects.client import TransientError
from expstate.storage.objects.failures import RefusedError, explain

OPTIONS = {
    "key": "AKIAIOSFODNN7EXAMPLE",
    "secret": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "client_kwargs": {"region_name": "us-east-1", "aws_session_token": "tokentokentoken"},
    "token": {"type": "service_account", "private_key": "-----BEGIN KEY-----", "scopes": ["scopescope"]},
    "password": "pw",
}


def explained(error: Exception) -> Exception:
    return explain(error, "writing 's3://bucket/key'", OPTIONS)


def wrapped(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("status", "code", "kind", "throttled"),
    [
        (400, "", StorageError, None),
        (400, "BadDigest", TransientError, False),
        (400, "RequestTimeout", TransientError, False),
        (400, "XAmzContentSHA256Mismatch", TransientError, False),
        (400, "ExpiredToken", StoragePermissionError, None),
        (400, "AuthorizationHeaderMalformed", StoragePermissionError, None),
        (400, "Throttling", TransientError, True),
        (301, "PermanentRedirect", StoragePermissionError, None),
        (307, "TemporaryRedirect", StoragePermissionError, None),
        (401, "", StoragePermissionError, None),
        (403, "SignatureDoesNotMatch", StoragePermissionError, None),
        (403, "RequestTimeTooSkewed", StoragePermissionError, None),
        (403, "userRateLimitExceeded", TransientError, True),
        (404, "NoSuchKey", FileNotFoundError, None),
        (404, "NoSuchUpload", FileNotFoundError, None),
        (405, "MethodNotAllowed", StorageError, None),
        (408, "", TransientError, False),
        (409, "ConditionalRequestConflict", TransientError, False),
        (409, "BlobAlreadyExists", FileExistsError, None),
        (411, "MissingContentLength", StorageError, None),
        (412, "PreconditionFailed", FileExistsError, None),
        (413, "EntityTooLarge", StorageError, None),
        (429, "", TransientError, True),
        (500, "InternalError", TransientError, False),
        (501, "NotImplemented", StorageError, None),
        (502, "", TransientError, False),
        (503, "SlowDown", TransientError, True),
        (503, "ServiceUnavailable", TransientError, True),
        (504, "", TransientError, False),
        (507, "InsufficientStorage", NoSpaceError, None),
        (400, "XMinioStorageFull", NoSpaceError, None),
    ],
)
def test_an_answer_is_one_of_few_errors(status: int, code: str, kind: type[Exception], throttled: bool | None) -> None:
    failure = explained(RefusedError(status, code, "what it said."))
    assert type(failure) is kind
    assert "writing 's3://bucket/key' failed" in str(failure)
    assert f"{status}" in str(failure)
    assert "what it said" in str(failure)
    assert ".;" not in str(failure)
    if isinstance(failure, TransientError):
        assert failure.throttled is throttled


class _ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int | None, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response: dict[str, Any] = {"Error": {"Code": code, "Message": "it said"}, "ResponseMetadata": {}}
        if status is not None:
            self.response["ResponseMetadata"]["HTTPStatusCode"] = status


class _AioHttpError(Exception):
    status = 503
    message = "busy"


class _AzureError(Exception):
    status_code = 412
    error_code = "ConditionNotMet"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            wrapped(OSError(22, "At least one of the pre-conditions you specified did not hold"), _ClientError(412, "PreconditionFailed")),
            FileExistsError,
        ),
        (wrapped(FileExistsError("it is there"), _ClientError(409, "ConditionalRequestConflict")), TransientError),
        (wrapped(OSError(5, "?"), _ClientError(None, "404")), FileNotFoundError),
        (wrapped(PermissionError("denied"), _ClientError(503, "SlowDown")), TransientError),
        (_AioHttpError(), TransientError),
        (_AzureError(), FileExistsError),
    ],
)
def test_the_answer_is_found_behind_what_libraries_make_of_it(error: Exception, kind: type[Exception]) -> None:
    assert type(explained(error)) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), TransientError),
        (ConnectionRefusedError("refused"), TransientError),
        (BrokenPipeError(), TransientError),
        (TimeoutError(), TransientError),
        (asyncio.TimeoutError(), TransientError),
        (socket.gaierror(-3, "temporary failure in name resolution"), TransientError),
        (EOFError(), TransientError),
        (OSError(errno.EHOSTUNREACH, "unreachable"), TransientError),
        (wrapped(OSError("something"), ConnectionAbortedError()), TransientError),
        (ssl.SSLCertVerificationError("certificate verify failed"), StorageError),
        (FileNotFoundError(2, "no"), FileNotFoundError),
        (NotADirectoryError(20, "no"), FileNotFoundError),
        (FileExistsError(17, "yes"), FileExistsError),
        (PermissionError(13, "no"), StoragePermissionError),
        (OSError(errno.EACCES, "no"), StoragePermissionError),
        (OSError(errno.ENOSPC, "full"), NoSpaceError),
        (OSError("words alone"), StorageError),
        (RuntimeError("words alone"), StorageError),
        (KeyError("name"), StorageError),
    ],
)
def test_what_no_server_said_is_told_by_its_kind(error: Exception, kind: type[Exception]) -> None:
    failure = explained(error)
    assert type(failure) is kind
    assert "writing 's3://bucket/key' failed" in str(failure)
    assert failure.__cause__ is error


@pytest.mark.parametrize("error", [InvalidArgumentError("text"), TransientError("text", throttled=True), MemoryError()])
def test_errors_of_ours_stay_as_they_are(error: Exception) -> None:
    assert explained(error) is error


@pytest.mark.parametrize(
    "text",
    [
        f"the key {OPTIONS['key']} is unknown",
        f"secret={OPTIONS['secret']}&x",
        "token tokentokentoken.",
        "-----BEGIN KEY-----",
        "scopescope",
    ],
)
def test_no_secret_of_the_options_is_shown(text: str) -> None:
    for error in (RefusedError(400, "Code", text), OSError(text), wrapped(OSError("text"), ValueError(text))):
        failure = explained(error)
        shown = f"{failure} {failure!r} {failure.__cause__}"
        assert not [secret for secret in ("AKIA", "wJalr", "tokentoken", "BEGIN KEY", "scopescope") if secret in shown]


def test_urls_are_shown_without_passwords_and_queries() -> None:
    failure = explained(OSError("cannot connect to http://me:pw@host:1/bucket/key?X-Amz-Signature=abc now"))
    assert "http://host:1/bucket/key now" in str(failure)
    assert failure.__cause__ is None


def test_words_that_are_no_secrets_stay() -> None:
    failure = explained(OSError("the bucket is in us-east-1, and pw is short"))
    assert "us-east-1, and pw" in str(failure)
    assert failure.__cause__ is not None


def test_a_long_answer_is_cut() -> None:
    assert len(str(explained(RefusedError(500, "", "word " * 10_000)))) < 700


def test_what_an_error_came_from_is_told_too() -> None:
    failure = explained(wrapped(OSError("Could not connect"), ConnectionResetError("the peer has reset it")))
    assert "OSError: Could not connect (ConnectionResetError: the peer has reset it)" in str(failure)
    assert "again" not in str(explained(wrapped(OSError("it failed: once"), OSError("once"))))


def test_what_the_caller_is_handling_is_not_what_an_error_came_from() -> None:
    try:
        fail(wrapped(FileExistsError(), RefusedError(412)))
    except FileExistsError:
        try:
            fail(ConnectionResetError())
        except ConnectionResetError as error:
            caught = error
        assert type(explained(caught)) is TransientError
        assert type(explained(wrapped(OSError("text"), RefusedError(404)))) is FileNotFoundError


def fail(error: Exception) -> None:
    raise error
