"""A tiny world to try methods in: scikit-learn's digits, a small classifier, its training and its score.

The packages that ``plait new`` makes run their first pipeline in it. Methods are named by import path,
``load-data: plait.demo.methods:Digits``; nothing is downloaded.
"""
