"""TLS for a proxy that leads TensorFlow's fixed Google hosts to the fake.

TensorFlow has no setting for another server, but its HTTP library obeys
`HTTPS_PROXY` and `CURL_CA_BUNDLE`: the fake answers CONNECT for these hosts,
with a certificate of an authority of its own.
"""

import datetime
import pathlib
import socket
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Tunnel:
  """Speaks TLS as any of `HOSTS`.

  Attributes:
    authority: The certificate that a client must trust.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    """Keeps its certificates in the folder."""
    self.authority = folder / "authority.pem"
    self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self._context.load_cert_chain(_make_certificates(folder, self.authority))

  def wrap(self, client: socket.socket) -> ssl.SSLSocket:
    """The connection of a client that was promised one of `HOSTS`."""
    return self._context.wrap_socket(client, server_side=True)


def _make_certificates(
  folder: pathlib.Path, authority: pathlib.Path
) -> pathlib.Path:
  """Makes an authority and a certificate of `HOSTS`; returns the chain."""
  start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
  end = start + datetime.timedelta(days=30)
  signer, name = ec.generate_private_key(ec.SECP256R1()), _name("authority")

  def signed(key, subject, extensions):
    builder = (
      x509.CertificateBuilder(name, subject, key.public_key())
      .serial_number(x509.random_serial_number())
      .not_valid_before(start)
      .not_valid_after(end)
    )
    for extension in extensions:
      builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(
      serialization.Encoding.PEM
    )

  basic = x509.BasicConstraints(ca=True, path_length=None)
  authority.write_bytes(signed(signer, name, [basic]))
  key = ec.generate_private_key(ec.SECP256R1())
  names = x509.SubjectAlternativeName([x509.DNSName(x) for x in HOSTS])
  chain = folder / "server.pem"
  chain.write_bytes(
    key.private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption(),
    )
    + signed(key, _name(HOSTS[0]), [names])
  )
  return chain


def _name(text: str) -> x509.Name:
  return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
