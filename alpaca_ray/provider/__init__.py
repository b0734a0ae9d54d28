"""Paid requests to a language-model API, shared by generation and evaluation."""
