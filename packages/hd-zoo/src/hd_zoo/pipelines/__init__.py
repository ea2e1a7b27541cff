"""A one-step student as a folder that diffusers loads (extra ``[diffusers]``).

Importing this needs diffusers only where a function writes such a folder.
"""

from hd_zoo.pipelines.export import export_pipeline, pipeline_kind
from hd_zoo.pipelines.one_step import OneStep, one_step

__all__ = ["OneStep", "export_pipeline", "one_step", "pipeline_kind"]
