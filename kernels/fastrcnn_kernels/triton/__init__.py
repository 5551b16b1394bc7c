"""Triton kernels and their launchers, one file per operator family. Imports torch and triton only."""
