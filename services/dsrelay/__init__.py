"""The KV relay of a node: rendezvous of owners and readers, and the road for KV that must leave the host."""
