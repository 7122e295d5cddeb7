"""The templates of HTML pages. Every value is escaped."""
