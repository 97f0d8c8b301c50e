"""Every message of the system, one module for each pair of parties.

``client``  client <-> router: the public protocol
``worker``  prefill, decode, relay <-> router
``kv``      prefill, decode <-> relay, and relay <-> relay

A message is a frozen tagged struct; on the wire it is one MessagePack map whose ``type`` is the class name.
Bulk bytes travel beside it as further raw frames, never inside.
"""

#: raised with every incompatible change; peers with another number are refused in the hello
PROTOCOL = 1
