package group_test

import (
	"testing"

	"kmsd/internal/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }
