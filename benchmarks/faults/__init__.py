"""Faulty and healthy training programs, each with its true cause, and how many of them are judged rightly."""
