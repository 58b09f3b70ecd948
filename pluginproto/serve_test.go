package pluginproto_test

func serveWhenAsked() bool { return false }
