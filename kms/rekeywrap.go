package kms

import (
	"cmp"
	"context"
	"fmt"

	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
	"kmsd/pluginproto"
)

const (
	// rekeyItems go to an HSM in one command, and rekeyCommands are in flight for all jobs
	// of a group together: one for each member of a group as most are. A request of somebody else
	// waits behind one of them, which is a millisecond with SoftHSM. With 32 items a rekey
	// needs a tenth more of the processors, with 16 a third; fewer commands make it slower
	// and others no faster.
	rekeyItems    = 50
	rekeyCommands = 3
	// rekeyBytes of input, or of additional data, are the most in one command, but for a
	// single item.
	rekeyBytes = 48 << 10
)

// rewrap begins to give every record of a page that needs it an envelope under the newest
// version of the master key. It returns when the last command has its turn, so that pages
// are done in their order.
func (r *rekey) rewrap(ctx context.Context, p *page) {
	master, err := r.target()
	if err != nil {
		p.fail(err)
		return
	}
	p.master = master
	room := r.kms.rekeys.room(master.rec.Group)
	for _, c := range chunks(p.records, master, r.record().Version) {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			p.fail(ctx.Err())
			return
		}
		p.work.Go(func() {
			defer func() { <-room }()
			if err := r.rewrapChunk(ctx, master, c); err != nil {
				p.fail(err)
			}
		})
	}
}

// chunk is some records that are wrapped under one version of the master key.
type chunk struct {
	index   int // of that version
	records []*rewrap
	sealed  []envelope.Envelope
	bytes   int // of all envelopes, or of all that is bound to them, whichever is more
}

// chunks sorts the records that need a rewrap by the version that they are under. What
// cannot be an envelope of the key fails here.
func chunks(records []rewrap, master *key, version int) (all []*chunk) {
	open := make(map[int]*chunk) // :: index of a version → what is not full yet
	for i := range records {
		w := &records[i]
		v := w.version()
		if v.Master >= version {
			continue
		}
		e, at, err := belongs(master, v)
		if err != nil {
			w.err = err
			continue
		}
		size := max(len(v.Envelope), envelope.MaxHeader+catalog.MaxDataKeyID+catalog.MaxDataKeyID)
		c := open[at]
		if c == nil || len(c.records) == rekeyItems || c.bytes+size > rekeyBytes {
			c = &chunk{index: at}
			open[at] = c
			all = append(all, c)
		}
		c.records, c.sealed, c.bytes = append(c.records, w), append(c.sealed, e), c.bytes+size
	}
	return all
}

// belongs reads the envelope of a version and finds the version of the master key that
// unwraps it.
func belongs(master *key, v *catalog.DataVersion) (envelope.Envelope, int, error) {
	doing := "unwrapping with key " + master.rec.Name
	e, err := envelope.Parse(v.Envelope)
	if err != nil {
		return e, 0, translate(doing, err)
	}
	at, ok := master.byID[e.Identity]
	switch {
	case !ok:
		return e, 0, wrongKey(master)
	case e.Algorithm != master.alg:
		return e, 0, translate(doing, fmt.Errorf("%w: it says %v, the key is %s", envelope.ErrFormat, e.Algorithm, master.typ))
	}
	return e, at, master.usable(at)
}

// rewrapChunk unwraps some records and wraps them again, in two commands. The plaintexts
// live only between them.
func (r *rekey) rewrapChunk(ctx context.Context, master *key, c *chunk) error {
	ctx, cancel := context.WithTimeout(ctx, defaultDeadline)
	defer cancel()
	plaintexts, err := r.unwrapChunk(ctx, master, c)
	if err != nil {
		return err
	}
	defer func() {
		for _, p := range plaintexts {
			clear(p)
		}
	}()
	return r.wrapChunk(ctx, master, c, plaintexts)
}

// unwrapChunk returns the plaintext of each record, nil for one that has failed.
func (r *rekey) unwrapChunk(ctx context.Context, master *key, c *chunk) ([][]byte, error) {
	cmd := pluginproto.Command{
		Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: master.ids[c.index],
		Items: make([]pluginproto.Item, len(c.records)),
	}
	for i, w := range c.records {
		e := &c.sealed[i]
		cmd.Items[i] = pluginproto.Item{Input: e.Ciphertext, IV: e.IV, AAD: e.AAD(w.aad())}
	}
	res, err := r.do(ctx, master, c.index, cmd)
	if err != nil {
		err = translate("unwrapping with key "+master.rec.Name, err)
		if stays(err) {
			return r.unwrapEach(ctx, master, c) // it is about one of them, or items are too new for a driver
		}
		return nil, err
	}
	plaintexts := make([][]byte, len(c.records))
	for i, it := range res.Items {
		if it.Err != nil {
			c.records[i].err = translate("unwrapping with key "+master.rec.Name, it.Err)
		} else {
			plaintexts[i] = it.Output
		}
	}
	return plaintexts, nil
}

// do runs a command with items.
func (r *rekey) do(ctx context.Context, master *key, index int, cmd pluginproto.Command) (pluginproto.Result, error) {
	res, err := r.kms.do(ctx, master, index, cmd)
	if err == nil && len(res.Items) != len(cmd.Items) {
		res.Wipe()
		err = fmt.Errorf("the driver answered %d items, want %d", len(res.Items), len(cmd.Items))
	}
	return res, err
}

// unwrapEach unwraps the records one by one.
func (r *rekey) unwrapEach(ctx context.Context, master *key, c *chunk) ([][]byte, error) {
	plaintexts := make([][]byte, len(c.records))
	for i, w := range c.records {
		plaintext, _, err := r.kms.unwrap(ctx, master, w.version().Envelope, w.aad())
		switch {
		case err == nil:
			plaintexts[i] = plaintext
		case stays(err):
			w.err = err
		default:
			for _, p := range plaintexts {
				clear(p)
			}
			return nil, err
		}
	}
	return plaintexts, nil
}

// wrapChunk gives the records that have a plaintext their new envelopes.
func (r *rekey) wrapChunk(ctx context.Context, master *key, c *chunk, plaintexts [][]byte) error {
	cmd := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: master.ids[master.primary]}
	header := envelope.Envelope{Algorithm: master.alg, Identity: cmd.Key}
	records := make([]*rewrap, 0, len(c.records))
	for i, w := range c.records {
		if plaintexts[i] == nil {
			continue
		}
		if err := master.countWrap(); err != nil {
			return err
		}
		records = append(records, w)
		cmd.Items = append(cmd.Items, pluginproto.Item{Input: plaintexts[i], IV: newIV(), AAD: header.AAD(w.aad())})
	}
	if len(records) == 0 {
		return nil
	}
	res, err := r.do(ctx, master, master.primary, cmd)
	if err == nil {
		err = checkWrappedItems(cmd.Items, res.Items)
	}
	if err != nil {
		return translate(wrappingWith(master), err)
	}
	for i, w := range records {
		e := header
		e.IV, e.Ciphertext = res.Items[i].IV, res.Items[i].Output
		v := w.version()
		v.Envelope, v.Master = e.Encode(), master.rec.Versions[master.primary].Number
		w.done = true
	}
	return nil
}

// checkWrappedItems makes sure that an envelope can be made of every answer to an item.
func checkWrappedItems(items []pluginproto.Item, answers []pluginproto.ItemResult) error {
	used := make(map[string]bool, len(items)) // :: IV → whether something has it
	for i, a := range answers {
		if err := cmp.Or(a.Err, checkWrapped(a.Output, a.IV, len(items[i].Input))); err != nil {
			return err
		}
		if used[string(a.IV)] {
			return errIVTwice()
		}
		used[string(a.IV)] = true
	}
	return nil
}

// aad is what the record's envelopes are bound to.
func (w *rewrap) aad() []byte {
	v := w.version()
	if w.isOld {
		return dataKeyAAD(w.old.Database, w.old.ID, v.Number, v.Object)
	}
	return dataKeyAAD(w.key.Database, w.key.ID, v.Number, v.Object)
}
