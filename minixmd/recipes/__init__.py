"""Bundled configs: python -m minixmd.train NAME"""
