"""Judging detections and classifications."""
