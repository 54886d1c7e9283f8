"""A proxy that leads TensorFlow's fixed Google hosts to the fake bucket.

TensorFlow has no setting for another server, but its HTTP library obeys
`HTTPS_PROXY` and `CURL_CA_BUNDLE`: the proxy answers for every host, with a
certificate of an authority of its own, and passes the requests on.
"""

import datetime
import pathlib
import socket
import ssl
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Proxy:
  """Answers CONNECT for `HOSTS`; use as a context manager.

  Attributes:
    port: The port on the loopback interface.
    authority: The certificate that a client must trust.
  """

  def __init__(self, port: int, folder: pathlib.Path) -> None:
    """Leads to the fake at `port`; keeps its certificates in the folder."""
    self._server = port
    self.authority = folder / "authority.pem"
    self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self._context.load_cert_chain(_make_certificates(folder, self.authority))
    self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
    self.port = self._socket.getsockname()[1]

  def environment(self) -> dict[str, str]:
    """The variables that lead TensorFlow, and all HTTPS, to this proxy."""
    return {
      "HTTPS_PROXY": f"http://127.0.0.1:{self.port}",
      "https_proxy": f"http://127.0.0.1:{self.port}",
      "CURL_CA_BUNDLE": str(self.authority),
      "NO_GCE_CHECK": "true",
    }

  def __enter__(self) -> "Proxy":
    threading.Thread(target=self._accept, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._socket.close()

  def _accept(self) -> None:
    while True:
      try:
        client, _ = self._socket.accept()
      except OSError:
        return
      threading.Thread(target=self._serve, args=(client,), daemon=True).start()

  def _serve(self, client: socket.socket) -> None:
    try:
      request = b""
      while b"\r\n\r\n" not in request:
        received = client.recv(4096)
        if not received:
          return
        request += received
      host = request.split()[1].decode().rpartition(":")[0]
      if not request.startswith(b"CONNECT ") or host not in HOSTS:
        client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        return
      client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
      with self._context.wrap_socket(client, server_side=True) as secure:
        with socket.create_connection(("127.0.0.1", self._server)) as server:
          back = threading.Thread(
            target=_copy, args=(server, secure), daemon=True
          )
          back.start()
          _copy(secure, server)
          back.join()
    except OSError:
      pass
    finally:
      client.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
  """Copies bytes until either side ends, then ends the other's reading."""
  try:
    while data := source.recv(1 << 18):
      target.sendall(data)
  except OSError:
    pass
  try:
    target.shutdown(socket.SHUT_RDWR)
  except OSError:
    pass


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
