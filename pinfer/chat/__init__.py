"""Chats: messages, templates, and the token ids that they come to."""

from pinfer.chat.process import ChatTemplateError
from pinfer.chat.render import Piece, Rendered, encode_chat, encode_rendered, render
from pinfer.chat.templates import built_in, find_template, read_template, stop_strings, suitable, template_names

__all__ = [
    "ChatTemplateError",
    "Piece",
    "Rendered",
    "built_in",
    "encode_chat",
    "encode_rendered",
    "find_template",
    "read_template",
    "render",
    "stop_strings",
    "suitable",
    "template_names",
]
