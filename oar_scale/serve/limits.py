"""What one server takes on at most, so that its memory and the time of each request are bounded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Bounds of what is read."""

    body_bytes: int = 32 << 20
    """Of one request: a picture and a mask, in base64."""
    bodies_bytes: int = 64 << 20
    """Of all requests that are being read, or wait for their pictures to be decoded."""
    body_s: float = 60.0
    """In which a request has to be there."""


@dataclass(frozen=True, kw_only=True)
class Limits(BodyLimits):
    """Bounds of requests, and of what is kept for them."""

    prompt_characters: int = 4000
    images_per_request: int = 10
    upload_bytes: int = 10 << 20
    """Of one picture that is sent, as a file."""
    pixels: int = 16 << 20
    """Of one picture that is sent; its size is read before it is decoded."""
    queue_jobs: int = 128
    """That wait for a slot."""
    queue_bytes: int = 256 << 20
    """Of the pictures that all unfinished jobs have sent."""
    job_s: float = 300.0
    """From its request to its end; after that it is stopped."""
    event_streams: int = 64
    """Open at once."""
    abandoned_s: float = 15.0
    """A job with an event stream that nobody reads for so long is stopped."""
    ended_jobs: int = 64
    """Whose events can still be read."""
    results_bytes: int = 256 << 20
    """Of the images that can still be fetched; the oldest go first."""
    drain_s: float = 10.0
    """For what is being drawn when the server is asked to stop; what has not ended by then is stopped."""
