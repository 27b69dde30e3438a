"""The packages: everything below mlx_blockskip/, and the folder convert/ as mlx_blockskip.converters."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mlx_blockskip*"]), "mlx_blockskip.converters"],
    package_dir={"mlx_blockskip.converters": "convert"},
    package_data={"mlx_blockskip": ["py.typed", "assets/**/*"]},
)
