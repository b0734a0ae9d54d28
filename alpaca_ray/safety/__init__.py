"""What keeps a served model accountable: the watermark on its output, the moderation of what goes in and out."""
