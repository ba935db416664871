"""The guard: nftables in the node's overlay namespaces, outside of the tasks' own, which no task can change."""
