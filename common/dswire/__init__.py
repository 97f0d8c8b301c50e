"""How the processes talk: errors, typed messages, codec, sockets, keys and the actor shell."""
