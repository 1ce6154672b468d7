"""``chatreid stats``: what built data sets hold, against what their recipe says."""
