"""AutoAttack (Croce and Hein, 2020): an ensemble of attacks, run in turn."""

from atat_jax.attacks.autoattack.run import AutoAttackResult, autoattack

__all__ = ["AutoAttackResult", "autoattack"]
