// keys makes the keys and certificates of one cluster run, all signed by an authority that exists only in its folder.
//
//	keys DIR NAME=HOST[,HOST...] ...
//
// writes DIR/ca.crt, DIR/ca.key, DIR/sa.key, DIR/sa.pub and, for each NAME, a serving certificate DIR/NAME.crt with DIR/NAME.key for those
// host names and addresses. Files that exist are left alone, so a second run completes what a first one began.
package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const lifetime = 10 * 365 * 24 * time.Hour

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: keys DIR NAME=HOST[,HOST...] ...")
		os.Exit(64)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "keys:", err)
		os.Exit(1)
	}
}

func run(dir string, servers []string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	authority, key, err := certificateAuthority(dir)
	if err != nil {
		return err
	}
	if err := serviceAccountKey(dir); err != nil {
		return err
	}
	for _, server := range servers {
		name, hosts, found := strings.Cut(server, "=")
		if !found || name == "" || strings.ContainsAny(name, "/.") {
			return fmt.Errorf("%q is not NAME=HOST[,HOST...]", server)
		}
		if err := servingCertificate(dir, name, strings.Split(hosts, ","), authority, key); err != nil {
			return err
		}
	}
	return nil
}

func certificateAuthority(dir string) (*x509.Certificate, crypto.Signer, error) {
	key, err := loadOrMakeKey(filepath.Join(dir, "ca.key"))
	if err != nil {
		return nil, nil, err
	}
	path := filepath.Join(dir, "ca.crt")
	if data, err := os.ReadFile(path); err == nil {
		block, _ := pem.Decode(data)
		if block == nil {
			return nil, nil, fmt.Errorf("%s holds no certificate: remove the folder and start again", path)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		return certificate, key, err
	}
	template := newTemplate("gantline-devcluster-ca")
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	if err := writePEM(path, "CERTIFICATE", der, 0o644); err != nil {
		return nil, nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	return certificate, key, err
}

func serviceAccountKey(dir string) error {
	key, err := loadOrMakeKey(filepath.Join(dir, "sa.key"))
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", der, 0o644)
}

func servingCertificate(dir, name string, hosts []string, authority *x509.Certificate, authorityKey crypto.Signer) error {
	path := filepath.Join(dir, name+".crt")
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	key, err := loadOrMakeKey(filepath.Join(dir, name+".key"))
	if err != nil {
		return err
	}
	template := newTemplate(name)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, host := range hosts {
		if address := net.ParseIP(host); address != nil {
			template.IPAddresses = append(template.IPAddresses, address)
		} else if host != "" {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority, key.Public(), authorityKey)
	if err != nil {
		return err
	}
	return writePEM(path, "CERTIFICATE", der, 0o644)
}

func newTemplate(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-time.Hour), // a clock that is set back must not break a running cluster
		NotAfter:     now.Add(lifetime),
	}
}

func loadOrMakeKey(path string) (crypto.Signer, error) {
	if data, err := os.ReadFile(path); err == nil {
		block, _ := pem.Decode(data)
		if block == nil {
			return nil, fmt.Errorf("%s holds no key: remove the folder and start again", path)
		}
		return x509.ParseECPrivateKey(block.Bytes)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(path, "EC PRIVATE KEY", der, 0o600)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) error {
	temporary := path + ".partial"
	if err := os.WriteFile(temporary, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}
