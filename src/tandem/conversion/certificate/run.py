"""`tandem verify`: who computes what training computes."""

from __future__ import annotations

from pathlib import Path

from tandem.conversion.certificate.content import read_certificate
from tandem.conversion.certificate.folder import verify_folder
from tandem.conversion.certificate.http import Lost, Server
from tandem.conversion.certificate.options import VerifyOptions
from tandem.conversion.certificate.result import Verified
from tandem.conversion.certificate.server import folder_of, served_model, verify_server
from tandem.errors import UserError


def run_verify(options: VerifyOptions) -> Verified:
    """Compare a folder or a server with a certificate.

    Raises:
        UserError: there is no certificate, the folder cannot be opened, or the server does not answer.
    """
    if options.url is None:
        assert options.folder is not None, "the options ask for one of both"
        place = Path(options.folder)
        return verify_folder(place if place.is_dir() else place.parent, read_certificate(place), options.tolerance)
    try:
        return _verify_url(Server(options.url, options.api_key, options.timeout), options)
    except Lost as error:
        raise UserError(str(error)) from None


def _verify_url(server: Server, options: VerifyOptions) -> Verified:
    entry = served_model(server, options.model)
    found = Path(options.folder) if options.folder else folder_of(entry)
    if found is None:
        raise UserError(
            f"--url {server.root} does not tell a folder with a certificate.json on this machine: give FOLDER, the one "
            f"that `tandem export` wrote"
        )
    return verify_server(server, str(entry["id"]), read_certificate(found), options.tolerance)
