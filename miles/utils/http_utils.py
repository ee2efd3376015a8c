"""`from miles.utils.http_utils import post`, as modules written for Miles have it."""

from miles.engines.post import get, post

__all__ = ["get", "post"]
