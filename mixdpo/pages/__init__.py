"""The templates of HTML pages. Every value is escaped."""

from jinja2 import Environment, PackageLoader, StrictUndefined

template = Environment(loader=PackageLoader("mixdpo", "pages"), autoescape=True, undefined=StrictUndefined).get_template
