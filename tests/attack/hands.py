"""Runs on a node with the node's own certificate, and does to etcd what it is told on its standard input.

Without the product's care: no guard, no signature, no check. Answers are JSON: status, detail, value.
"""

import base64
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hivewire.identity import SWARM_CERTIFICATES, IdentityFiles, load
from hivewire.store.api import prefix_end
from tests.attack.verbs import Answer, Etcd, delete, get, nested, op, put


def main() -> None:
    words = json.load(sys.stdin)
    own = load(IdentityFiles.in_folder(Path(words.get("folder") or SWARM_CERTIFICATES)))
    etcd = Etcd(words["endpoint"], own.roots_pem, own.certificate_pem, own.key_pem)
    answers = [answer for call in words["calls"] for answer in do(etcd, *call)]
    json.dump([(it.status, it.detail, base64.b64encode(it.read).decode()) for it in answers], sys.stdout)


def do(etcd: Etcd, verb: str, key: str, value: str = "", count: int = 1) -> list[Answer]:
    data = base64.b64decode(value)
    match verb:
        case "put":
            return [etcd.put(key, data)]
        case "nested put":
            return [etcd.txn(nested(op(put(key, data))))]
        case "nested delete":
            return [etcd.txn(nested(op(delete(key))))]
        case "delete":
            return [etcd.txn(op(delete(key)))]
        case "delete below":
            return [etcd.txn(op(delete(key, prefix_end(key).encode())))]
        case "get":
            return [_value(etcd, key)]
        case "try":
            return [etcd.get(key)]
        case "list":
            return [_items(etcd, key)]
        case "flood":
            return [_flood(etcd, key, data, count)]
        case "wait":
            time.sleep(count / 1000)
            return []
    raise ValueError(verb)


def _value(etcd: Etcd, key: str) -> Answer:
    found = etcd.kv.Range(get(key), timeout=5).kvs
    return Answer("OK", read=found[0].value if found else b"")


def _items(etcd: Etcd, prefix: str) -> Answer:
    found = etcd.kv.Range(get(prefix, prefix_end(prefix).encode()), timeout=5).kvs
    items = {it.key.decode(): base64.b64encode(it.value).decode() for it in found}
    return Answer("OK", read=json.dumps(items).encode())


def _flood(etcd: Etcd, prefix: str, data: bytes, count: int) -> Answer:
    """So many keys as fast as one connection goes."""
    begun, pending = time.monotonic(), []
    for number in range(count):
        pending.append(etcd.kv.Put.future(put(f"{prefix}{number:06}", data), timeout=60))
        if len(pending) > 200:
            pending.pop(0).result()
    for each in pending:
        each.result()
    return Answer("OK", f"{count / (time.monotonic() - begun):.0f} per second")


if __name__ == "__main__":
    main()
