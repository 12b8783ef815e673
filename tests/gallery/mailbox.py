"""A mail server on loopback that keeps what it is given."""

from __future__ import annotations

import email
import email.policy
import socket
from collections import Counter
from contextlib import contextmanager

from aiosmtpd.controller import Controller

from transom.gallery.mail import MailSettings


class Mailbox:
    """Handler of aiosmtpd: what came for whom, and what happens on the way.

    `at[command]` is called with how often that command has come, and may return the answer.
    """

    def __init__(self):
        self.letters = []  # (recipient, message)
        self.at = {}
        self.seen = Counter()

    def _happens(self, command):
        self.seen[command] += 1
        return self.at.get(command, lambda count: None)(self.seen[command])

    async def handle_MAIL(self, server, session, envelope, address, options):
        answer = self._happens("MAIL")
        envelope.mail_from = address
        return answer or "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):
        answer = self._happens("RCPT")
        if answer is None:
            envelope.rcpt_tos.append(address)
        return answer or "250 OK"

    async def handle_DATA(self, server, session, envelope):
        answer = self._happens("before")
        if answer is None:
            message = email.message_from_bytes(envelope.content, policy=email.policy.default)
            self.letters += [(to, message) for to in envelope.rcpt_tos]
            answer = self._happens("DATA")
        return answer or "250 OK"

    @property
    def recipients(self):
        return Counter(to for to, _ in self.letters)


@contextmanager
def mail_server(box, **options):
    """The server, and settings that lead to it."""
    ours = ("tls", "user", "password", "ca_file")
    changes = {name: options.pop(name) for name in ours if name in options}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port, **options)
    controller.start()
    try:
        yield settings_for(port, **changes)
    finally:
        controller.stop()


def settings_for(port, **changes):
    given = {"tls": "none", "sender": "transom <papers@example.org>", **changes}
    return MailSettings(host="127.0.0.1", port=port, base_url="https://gallery.example", **given)


def parts(message):
    """A message as text and as HTML."""
    return tuple(message.get_body((kind,)).get_content() for kind in ("plain", "html"))
