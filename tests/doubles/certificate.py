"""A certificate for 127.0.0.1 that signs itself, and its key: used in tests and nowhere else.

Made by `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500
-subj /CN=cortexd-test -addext subjectAltName=IP:127.0.0.1
-addext basicConstraints=critical,CA:TRUE`.
"""

from __future__ import annotations

import ssl
from pathlib import Path

_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgwx4O1jJJsMI7dycP
gnB1lWdxyILhske0ZmUmOx4GAMOhRANCAAT2XUMHX79mmFHCG42sw486XIiqYJuJ
FlOSt/x5vQdkXAhAIGndKTL5w7OJWFf4me9jvVoIVsRfIrg8TfDAck63
-----END PRIVATE KEY-----
"""
_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBljCCATygAwIBAgIUddtcXPCObOnmp0Y2l2jBs1rYciMwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMY29ydGV4ZC10ZXN0MCAXDTI2MTEyMTE4MTcxMFoYDzIxMjYx
MDI4MTgxNzEwWjAXMRUwEwYDVQQDDAxjb3J0ZXhkLXRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAAT2XUMHX79mmFHCG42sw486XIiqYJuJFlOSt/x5vQdkXAhA
IGndKTL5w7OJWFf4me9jvVoIVsRfIrg8TfDAck63o2QwYjAdBgNVHQ4EFgQUrcxc
RMGdIqwS+2hGUq+SgCGLLtswHwYDVR0jBBgwFoAUrcxcRMGdIqwS+2hGUq+SgCGL
LtswDwYDVR0RBAgwBocEfwAAATAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMC
A0gAMEUCIQDA1TZAJn+uGUvnH72sfvQ+tbCPVnKjBrPTND9j1NWz0wIgZrv4oza/
g9/Uqe191rwNNmGBk1DbAEhhiwvHbmyhgDc=
-----END CERTIFICATE-----
"""


def write_certificate(folder: Path) -> Path:
    """Write the certificate and return its file."""
    path = folder / "certificate.pem"
    path.write_text(_CERTIFICATE)
    return path


def serving_context(folder: Path) -> ssl.SSLContext:
    """Return what a server needs to prove that it is 127.0.0.1."""
    key = folder / "key.pem"
    key.write_text(_KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(write_certificate(folder), key)
    return context
