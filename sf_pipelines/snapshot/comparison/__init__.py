"""How two snapshots differ: their answers, their ids, what routes. Used by the gate's drift check and by ``diff``."""
