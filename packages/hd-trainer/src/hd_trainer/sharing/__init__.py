"""A finished run as a folder to upload."""

from hd_trainer.sharing.folder import check_finished, export

__all__ = ["check_finished", "export"]
