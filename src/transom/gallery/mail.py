"""Mail: the configuration, messages, and a way of sending that never sends twice.

A message counts as accepted when the mail server has read its last line. `Connection.send` hands
over everything but that line, lets the caller note that it is about to be said, and says it. A
process that dies before leaves a message that the server throws away; one that dies after has
noted it. What remains is the moment between the note and the last line.
"""

from __future__ import annotations

import configparser
import email.utils
import ipaddress
import logging
import os
import re
import smtplib
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from types import TracebackType

from transom.errors import MailError

log = logging.getLogger(__name__)

TLS = ("starttls", "tls", "none")
SECONDS = 30.0
"""How long a mail server may take to answer."""

_KEYS = ("host", "port", "tls", "user", "password", "password_file", "ca_file", "from", "base_url")
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")


@dataclass(frozen=True)
class MailSettings:
    """How mail is sent.

    Attributes:
        host: the mail server.
        port: of it; 587 for starttls, 465 for tls, 25 for none by default.
        tls: 'starttls', 'tls' from the first byte, or 'none'.
        user: to log in as; None for no login.
        password: of the user.
        ca_file: certificates to trust instead of the system's.
        sender: 'Name <address>' or an address.
        base_url: where the gallery stands; links in letters lead there.
    """

    host: str
    port: int
    sender: str
    tls: str = "starttls"
    user: str | None = None
    password: str | None = None
    ca_file: str | None = None
    base_url: str = "http://127.0.0.1:8080"

    def __post_init__(self) -> None:
        if self.tls not in TLS:
            raise MailError(f"tls is {self.tls!r}; expected one of {', '.join(TLS)}")
        if not 0 < self.port < 65536:
            raise MailError(f"port is {self.port}; expected a number from 1 to 65535")
        check_address(email.utils.parseaddr(self.sender)[1], "from")
        if self.user is not None and self.password is None:
            raise MailError("there is a user and no password; give password or password_file")
        if self.user is not None and self.tls == "none" and not _is_loopback(self.host):
            raise MailError(
                f"a login at {self.host} without TLS would show the password to everybody on the "
                "way; set tls to starttls or tls"
            )
        if not re.match(r"https?://[^\s/<>\"]+", self.base_url):
            raise MailError(f"base_url is {self.base_url!r}; expected http://... or https://...")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_path() -> Path:
    """`TRANSOM_MAIL_CONFIG`, else mail.ini in the user's configuration folder."""
    given = os.environ.get("TRANSOM_MAIL_CONFIG")
    if given:
        return Path(given)
    from platformdirs import user_config_path

    return Path(user_config_path("transom", appauthor=False)) / "mail.ini"


def load_settings(
    path: str | Path | None = None, *, base_url: str = "http://127.0.0.1:8080"
) -> MailSettings:
    """The mail settings of an INI file with one section, [mail].

    Args:
        path: the file; :func:`default_path` by default.
        base_url: of links, where the file names none.

    Raises:
        MailError: the file is not there, or something in it is wrong or missing.
    """
    path = Path(path) if path is not None else default_path()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_file(file)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        raise MailError(
            f"no mail settings: {path} is not there; write it with a section [mail] and host, "
            "from, tls, user and password in it, or set TRANSOM_MAIL_CONFIG"
        ) from None
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = str(error).splitlines()[0]
        raise MailError(f"{path}: cannot be read as mail settings: {reason}") from None
    if not parser.has_section("mail"):
        raise MailError(f"{path}: has no section [mail]")
    given = dict(parser["mail"])
    unknown = sorted(set(given) - set(_KEYS))
    if unknown:
        raise MailError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    for key in ("host", "from"):
        if not given.get(key):
            raise MailError(f"{path}: {key} is missing")
    if "password" in given and mode & 0o077:
        log.warning("%s holds a password and others may read it; chmod 600 %s", path, path)
    password = given.get("password")
    if "password_file" in given:
        try:
            password = (path.parent / given["password_file"]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MailError(f"{path}: password_file cannot be read: {error}") from None
    tls = given.get("tls", "starttls")
    port = given.get("port") or {"starttls": "587", "tls": "465"}.get(tls, "25")
    if not port.isdecimal():
        raise MailError(f"{path}: port is {port!r}; expected a number")
    try:
        return MailSettings(
            host=given["host"],
            port=int(port),
            sender=given["from"],
            tls=tls,
            user=given.get("user"),
            password=password,
            ca_file=str(path.parent / given["ca_file"]) if "ca_file" in given else None,
            base_url=given.get("base_url", base_url).rstrip("/"),
        )
    except MailError as error:
        raise MailError(f"{path}: {error}") from None


def check_address(address: str, what: str = "address") -> str:
    """One plain mail address, its domain in small letters.

    Raises:
        MailError: it is none, or several.
    """
    text = address.strip()
    if len(text) > 254 or not _ADDRESS.fullmatch(text):
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise MailError(f"{what} is {shown!r}; expected one mail address such as ada@example.org")
    name, _, domain = text.rpartition("@")
    return f"{name}@{domain.lower()}"


def message(
    settings: MailSettings,
    to: str,
    subject: str,
    text: str,
    html: str,
    *,
    unsubscribe: str | None = None,
) -> bytes:
    """A message as it goes over the wire.

    Args:
        settings: whose sender it carries.
        to: checked address.
        subject: one line.
        text: for readers without HTML.
        html: for the others.
        unsubscribe: address that ends the subscription by one POST (RFC 8058).
    """
    name, sender = email.utils.parseaddr(settings.sender)
    domain = sender.rpartition("@")[2]
    # Lines as long as they may be: a folded link is an encoded one, which no reader follows.
    made = EmailMessage(policy=SMTP.clone(max_line_length=998, cte_type="7bit"))
    made["From"] = Address(name, addr_spec=sender)
    made["To"] = Address(addr_spec=to)
    made["Subject"] = subject
    made["Date"] = email.utils.localtime()
    made["Message-ID"] = email.utils.make_msgid(domain=domain)
    made["Auto-Submitted"] = "auto-generated"
    if unsubscribe is not None:
        made["List-Unsubscribe"] = f"<{unsubscribe}>"
        made["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    made.set_content(text)
    made.add_alternative(html, subtype="html")
    return made.as_bytes()


class Refused(Exception):
    """The server does not take one message.

    Attributes:
        code: its answer; from 500 on it will not take it later either.
    """

    def __init__(self, code: int, reason: bytes | str) -> None:
        text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else reason
        super().__init__(f"{code} {text}")
        self.code = code


class Unsure(Exception):
    """The last line was said and no answer came: the message may have been accepted."""


class Connection:
    """A session with the mail server; a context manager.

    Raises:
        OSError: the server cannot be reached or hung up (smtplib's errors are OSErrors).
        MailError: it refuses the login, the sender, or TLS.
    """

    def __init__(self, settings: MailSettings) -> None:
        self.settings = settings
        context = ssl.create_default_context(cafile=settings.ca_file)
        self._smtp: smtplib.SMTP
        if settings.tls == "tls":
            self._smtp = smtplib.SMTP_SSL(
                settings.host, settings.port, timeout=SECONDS, context=context
            )
        else:
            self._smtp = smtplib.SMTP(settings.host, settings.port, timeout=SECONDS)
        try:
            self._greet(context)
        except BaseException:
            self._smtp.close()
            raise

    def _greet(self, context: ssl.SSLContext) -> None:
        where = f"{self.settings.host}:{self.settings.port}"
        self._smtp.ehlo_or_helo_if_needed()
        if self.settings.tls == "starttls":
            if not self._smtp.has_extn("starttls"):
                raise MailError(
                    f"the mail server {where} does not offer STARTTLS; set tls to tls or, on this "
                    "machine only, to none"
                )
            self._smtp.starttls(context=context)
            self._smtp.ehlo()
        if self.settings.user is not None:
            try:
                self._smtp.login(self.settings.user, self.settings.password or "")
            except smtplib.SMTPAuthenticationError as error:
                if 400 <= error.smtp_code < 500:
                    raise
                raise MailError(
                    f"the mail server {where} refuses the login of {self.settings.user}: "
                    f"{Refused(error.smtp_code, error.smtp_error)}; check user and password"
                ) from None
            except smtplib.SMTPNotSupportedError:
                raise MailError(
                    f"the mail server {where} offers no login; leave user and password out"
                ) from None

    def send(self, to: str, content: bytes, about_to: Callable[[], bool]) -> bool:
        """Hand one message over.

        Args:
            to: the recipient.
            content: the message.
            about_to: called when everything but the last line has been said; False gives up, and
                the server throws the message away.

        Returns:
            Whether the server accepted it.

        Raises:
            Refused: the server does not take it.
            Unsure: no answer came after the last line.
            OSError: the connection broke before the last line.
        """
        smtp = self._smtp
        code, reason = smtp.mail(email.utils.parseaddr(self.settings.sender)[1])
        if code != 250:
            smtp.rset()
            if code >= 500:
                raise MailError(
                    f"the mail server refuses the sender {self.settings.sender}: "
                    f"{Refused(code, reason)}"
                )
            raise Refused(code, reason)
        code, reason = smtp.rcpt(to)
        if code not in (250, 251):
            smtp.rset()
            raise Refused(code, reason)
        code, reason = smtp.docmd("DATA")
        if code != 354:
            smtp.rset()
            raise Refused(code, reason)
        lines = re.sub(rb"\r\n|\r|\n", b"\r\n", content)
        lines = re.sub(rb"(?m)^\.", b"..", lines)  # a lone dot would be the last line
        smtp.send(lines if lines.endswith(b"\r\n") else lines + b"\r\n")
        if not about_to():
            smtp.close()
            return False
        try:
            smtp.send(b".\r\n")
            code, reason = smtp.getreply()
        except OSError as error:
            raise Unsure(str(error)) from error
        if code != 250:
            raise Refused(code, reason)
        return True

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._smtp.quit()
        except OSError:
            log.debug("the mail server hung up before goodbye")
        finally:
            self._smtp.close()
