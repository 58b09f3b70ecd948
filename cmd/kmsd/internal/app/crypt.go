package app

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

// maxStdin bounds what wrap, unwrap and rewrap read, in bytes: the largest
// envelope in base64, with room for line breaks. What is over a limit of the API
// itself is refused by the server, in its words.
const maxStdin = 256 << 10

// coding says how bytes look on stdin and stdout.
type coding struct {
	raw bool
	aad string
}

func (c *coding) addFlags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&c.raw, "raw", false, "bytes as they are on stdin and stdout, in place of base64")
	cmd.Flags().StringVar(&c.aad, "aad", "", "context that is authenticated and must be the same to unwrap")
}

func newWrap(s *session) *cobra.Command {
	return s.newCrypt(api.OpWrap, "wrap NAME", "Wrap what is on stdin, 1 byte to 64 KiB, under a key")
}

func newUnwrap(s *session) *cobra.Command {
	return s.newCrypt(api.OpUnwrap, "unwrap NAME", "Unwrap an envelope on stdin")
}

func newRewrap(s *session) *cobra.Command {
	return s.newCrypt(api.OpRewrap, "rewrap NAME", "Move an envelope on stdin to the newest version of its key")
}

func (s *session) newCrypt(op api.Op, use, short string) *cobra.Command {
	var c coding
	cmd := s.keyed(use, short, func(ctx context.Context, svc service, name string) error {
		if c.raw && s.output == "json" {
			return &usageError{msg: "--raw and -o json exclude each other"}
		}
		in, err := s.readInput(c.raw)
		if err != nil {
			return err
		}
		defer clear(in)
		item := api.Item{AAD: []byte(c.aad)}
		if op == api.OpWrap {
			item.Plaintext = in
		} else {
			item.Wrapped = in
		}
		res, err := one(ctx, svc, op, name, item)
		if err != nil {
			return err
		}
		defer clear(res.Plaintext)
		if s.output == "json" {
			return s.printJSON(res)
		}
		out := res.Wrapped
		if op == api.OpUnwrap {
			out = res.Plaintext
		}
		return s.writeBytes(out, c.raw)
	})
	cmd.Long = short + ".\nInput and output are base64; --raw takes and gives bytes as they are."
	c.addFlags(cmd)
	return cmd
}

func newDataKey(s *session) *cobra.Command {
	var item api.Item
	var aad string
	cmd := s.keyed("datakey NAME", "Make a data key in an HSM, in the clear and wrapped", func(ctx context.Context, svc service, name string) error {
		if item.Bytes < 1 || item.Bytes > api.MaxDataKey { // zero would mean the default on the wire
			return &usageError{msg: fmt.Sprintf("--bytes %d: a data key has 1 to %d bytes", item.Bytes, api.MaxDataKey)}
		}
		item.AAD = []byte(aad)
		res, err := one(ctx, svc, api.OpDataKey, name, item)
		if err != nil {
			return err
		}
		defer clear(res.Plaintext)
		return s.print(res, func(w io.Writer) error {
			if item.WrappedOnly { // as wrap prints it, and unwrap takes it
				return s.writeBytes(res.Wrapped, false)
			}
			_, err := fmt.Fprintf(w, "plaintext: %s\nwrapped:   %s\nversion:   %d\n", base64.StdEncoding.EncodeToString(res.Plaintext),
				base64.StdEncoding.EncodeToString(res.Wrapped), res.Version)
			return err
		})
	})
	f := cmd.Flags()
	f.IntVar(&item.Bytes, "bytes", 32, "length, 1 to 1024")
	f.BoolVar(&item.WrappedOnly, "wrapped-only", false, "print nothing but the wrapped form, in base64 for unwrap")
	f.StringVar(&aad, "aad", "", "context that is authenticated and must be the same to unwrap")
	return cmd
}

// one is a batch of one, because only a batch tells the version.
func one(ctx context.Context, svc service, op api.Op, name string, item api.Item) (api.Result, error) {
	results, err := svc.Batch(ctx, op, name, []api.Item{item})
	switch {
	case err != nil:
		return api.Result{}, err
	case len(results) != 1:
		return api.Result{}, api.NewError(api.CodeInternal, fmt.Sprintf("%d results for one item", len(results)), nil)
	case results[0].Error != nil:
		return api.Result{}, results[0].Error
	}
	return results[0], nil
}

// readInput reads stdin to its end.
func (s *session) readInput(raw bool) ([]byte, error) {
	if terminal(s.In) {
		fmt.Fprintln(s.Err, "kmsd: reading the terminal; end with ctrl-D")
	}
	in, err := io.ReadAll(io.LimitReader(s.In, maxStdin+1))
	if err != nil {
		return nil, fmt.Errorf("reading stdin: %w", err)
	}
	if len(in) > maxStdin {
		return nil, api.NewError(api.CodeTooLarge, fmt.Sprintf("stdin has more than %d bytes", maxStdin), nil)
	}
	if raw {
		return in, nil
	}
	defer clear(in)
	in = bytes.TrimSpace(in)
	out := make([]byte, base64.StdEncoding.DecodedLen(len(in)))
	n, err := base64.StdEncoding.Decode(out, in)
	if err != nil {
		clear(out)
		return nil, &usageError{msg: "stdin is not standard base64; use --raw for bytes as they are"}
	}
	return out[:n], nil
}

func (s *session) writeBytes(b []byte, raw bool) error {
	if !raw {
		b = append(base64.StdEncoding.AppendEncode(nil, b), '\n')
		defer clear(b)
	}
	if _, err := s.Out.Write(b); err != nil {
		return fmt.Errorf("writing stdout: %w", err)
	}
	return nil
}
