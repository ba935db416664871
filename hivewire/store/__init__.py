"""The store between controller and agents: its protocol, an in-memory one, etcd, and a mirror of chosen prefixes."""
